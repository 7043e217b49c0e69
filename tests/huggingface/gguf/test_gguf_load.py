"""A GGUF file is a model to use: tokenizer, chat template and text."""

from pathlib import Path

import jax
import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.chat import get_chat_template
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.huggingface.gguf.reading import open_gguf_model
from maxlm.huggingface.gguf.tokenizer_writing import PROBES, make_tokenizer_metadata
from maxlm.huggingface.gguf.writer import GgufFileWriter, TensorSpec
from maxlm.inference.generate import collect_tokens, generate
from maxlm.run.convert import convert
from maxlm.run.load import LoadedRun, load_model
from maxlm.tune.examples import open_tokenizer
from tests.huggingface.gguf.files import list_llama_shapes
from tests.huggingface.gguf.test_gguf_tensors import METADATA

pytest.importorskip("gguf")

NUM_ROWS = 640


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [f"{probe} {number}" for probe in PROBES for number in range(200)]
    config = TokenizerConfig(
        kind="sentencepiece_bpe", vocab_size=600, chat="chatml", eos="<|im_end|>"
    )
    return train_tokenizer(config, texts)


@pytest.fixture(scope="module")
def path(tokenizer, tmp_path_factory) -> Path:
    """Random weights in Q8_0, with a tokenizer of fewer ids than the table has rows."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    sizes = {key: x for key, x in METADATA.items() if "expert" not in key}
    metadata, _ = make_tokenizer_metadata(tokenizer, NUM_ROWS)
    shapes = list_llama_shapes(1, 64, 96, 4, 2, NUM_ROWS, head=False)
    specs = {
        name: TensorSpec("Q8_0" if len(shape) > 1 else "F32", shape)
        for name, shape in shapes.items()
    }
    writer = GgufFileWriter(path, "llama", sizes | metadata, specs)
    random = np.random.default_rng(3)
    for name, shape in shapes.items():
        writer.write(name, random.normal(size=shape).astype(np.float32))
    return path


def draw(loaded: LoadedRun) -> list[list[int]]:
    prompts = [loaded.tokenizer.encode(text) for text in ("Hello,", "12 34")]
    sampling = SamplingConfig(temperature=0, max_new_tokens=8)
    with jax.set_mesh(loaded.mesh):
        return collect_tokens(
            generate(loaded.model, loaded.params, prompts, sampling, vocab_size=600)
        )


@pytest.mark.heavy
def test_a_file_is_used_as_the_run_that_it_becomes(path, tokenizer, tmp_path):
    loaded = load_model(path)
    convert(path, tmp_path / "run")
    run = load_model(tmp_path / "run")
    assert loaded.config.name == "small"
    assert loaded.config.model == run.config.model
    assert draw(loaded) == draw(run)
    for opened in (loaded.tokenizer, run.tokenizer, open_tokenizer(path)):
        assert opened.bos_id == tokenizer.bos_id
        assert opened.stop_ids[0] == tokenizer.eos_id
        assert opened.prefix_ids == tokenizer.prefix_ids
        assert get_chat_template(opened) == get_chat_template(tokenizer)
        for probe in PROBES[:-3]:
            assert opened.encode(probe) == tokenizer.encode(probe)
    # And back: a file of the run has the same tokenizer.
    convert(tmp_path / "run", tmp_path / "again.gguf", quantization="q8_0")
    again = open_gguf_model(tmp_path / "again.gguf").file.metadata
    first = open_gguf_model(path).file.metadata
    for key in ("tokens", "token_type", "bos_token_id", "eos_token_id"):
        name = f"tokenizer.ggml.{key}"
        assert np.array_equal(again[name], first[name]), key
