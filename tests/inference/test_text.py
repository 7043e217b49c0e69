"""Promise: the text is what the model's tokens decode to, whole characters at a
time."""

from math import prod
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.data.tokenizer.prompts import encode_prompts
from maxlm.inference.generate import collect_tokens, generate
from maxlm.inference.text import generate_text, get_prompt_separator
from maxlm.models.architectures.encoder_decoder import EncoderDecoderConfig
from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.params import param_specs
from maxlm.run.config import RunConfig
from maxlm.run.prepare import prepare_data
from maxlm.run.setup import set_up_run
from maxlm.sharding import AxisRules
from maxlm.train import report
from tests.train import tiny

pytestmark = pytest.mark.heavy

BOS, EOS, NAMED = 0, 1, 258
SAMPLING = SamplingConfig(temperature=2.0, max_new_tokens=40, seed=3)


class ByteTokenizer:
    """One id a byte, from 2 on."""

    vocab_size, bos_id, eos_id = NAMED, BOS, EOS
    prefix_ids, stop_ids = (BOS,), (EOS,)

    def encode(self, text, *, allow_special=False):
        return [b + 2 for b in (text.encode() if isinstance(text, str) else text)]

    def decode_bytes(self, ids, *, continued=False):
        return b"".join(bytes([i - 2]) if i > 1 else b"<special>" for i in ids)


@pytest.fixture
def model(one_device_mesh):
    config = DecoderConfig(
        vocab_size=NAMED + 300,  # a padded table: more rows than the tokenizer has ids
        num_layers=1,
        d_model=8,
        max_seq_len=64,
        attention={"num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
        mlp={"d_ff": 8},
    )
    with jax.set_mesh(one_device_mesh):
        yield Decoder(config, rules=AxisRules(), dtype=jnp.float32)


def test_pieces_join_to_the_decoded_tokens(model):
    tokenizer = ByteTokenizer()
    prompts = ["größer", b"\xff\x00", ""]
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(
        lambda s: jnp.asarray(draw(0, 0.02, s.shape), s.dtype), param_specs(model)
    )
    ids = [[BOS, *tokenizer.encode(prompt)] for prompt in prompts]
    outputs = generate(model, params, ids, SAMPLING, tokenizer=tokenizer)
    rows = collect_tokens(outputs)
    tokens = [[t for t in row if t != EOS] for row in rows]
    expected = [
        tokenizer.decode_bytes(row).decode("utf-8", "replace") for row in tokens
    ]

    steps = list(generate_text(model, params, tokenizer, prompts, SAMPLING))
    assert ["".join(pieces) for pieces in zip(*steps, strict=True)] == expected
    # Tokens of a nearly uniform model are mostly parts of no character.
    assert all("\ufffd" in text for text in expected)
    assert len(steps) > 5


class ForeignTokenizer(ByteTokenizer):
    """Opens prompts with nothing, and takes the first space of a text away."""

    prefix_ids = ()

    def decode_bytes(self, ids, *, continued=False):
        text = super().decode_bytes(ids)
        return text if continued else text.removeprefix(b" ")


def continue_with_spaces(model, tokenizer, prompts) -> list[str]:
    """What a model writes that never says anything but " "."""
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), param_specs(model))
    sampling = SamplingConfig(max_new_tokens=3, logit_bias={ord(" ") + 2: 100.0})
    steps = generate_text(model, params, tokenizer, prompts, sampling)
    return ["".join(pieces) for pieces in zip(*steps, strict=True)]


@pytest.mark.more
def test_a_continuation_keeps_its_space_and_a_text_that_begins_does_not(
    model, one_device_mesh
):
    prompts = ["a", "bc", ""]
    assert continue_with_spaces(model, ForeignTokenizer(), prompts) == [
        "   ",
        "   ",
        "  ",
    ]
    config = EncoderDecoderConfig(
        vocab_size=NAMED,
        num_layers=1,
        encoder_layers=1,
        d_model=8,
        max_seq_len=64,
        attention={"num_heads": 2, "num_kv_heads": 2, "head_dim": 4},
        mlp={"d_ff": 8},
    )
    with jax.set_mesh(one_device_mesh):
        both = config.build(rules=AxisRules(), dtype=jnp.float32)
    assert continue_with_spaces(both, ForeignTokenizer(), ["a", ""]) == ["  ", "  "]
    assert get_prompt_separator(both) == "\n"


def test_a_prompt_opens_as_the_tokenizer_says_and_an_encoder_reads_a_whole_document():
    prompts = ["a", "bc", ""]
    a, b, c = (ord(char) + 2 for char in "abc")
    foreign = ForeignTokenizer()
    byte_tokenizer = ByteTokenizer()
    assert encode_prompts(foreign, prompts, as_documents=False) == [[a], [b, c], [BOS]]
    assert encode_prompts(foreign, prompts, as_documents=True) == [
        [a, EOS],
        [b, c, EOS],
        [EOS],
    ]
    assert encode_prompts(byte_tokenizer, prompts, as_documents=False) == [
        [BOS, a],
        [BOS, b, c],
        [BOS],
    ]


def sampling_run(folder, **parts: tiny.Part):
    samples = {"prompts": ["the quiet sea", "", "gulls " * 30], "max_new_tokens": 9}
    settings = tiny.settings(
        folder, tiny.write_text(folder / "text"), samples=samples, **parts
    )
    return RunConfig.model_validate(settings)


@pytest.mark.more
def test_samples_of_a_run_do_not_depend_on_its_mesh(tmp_path):
    """Training may split the sequence and the layers; generation cannot."""
    texts = []
    for sizes in ({}, {"context": 2, "stage": 2, "tensor": 2}):
        residual = {"compute": {"residual": ["context", "tensor"]}}
        mesh, train = {"fsdp": 1, **sizes}, {"micro_batches": 2}
        config = sampling_run(tmp_path, mesh=mesh, train=train, sharding=residual)
        setup = set_up_run(config, jax.devices()[: prod(sizes.values())])
        run = SimpleNamespace(setup=setup, state=setup.init_train_state())
        run.data = SimpleNamespace(tokenizer=ByteTokenizer())
        texts.append(report.generate_samples(run))
    assert texts[0] == texts[1] != ""


def test_prompts_that_do_not_fit_the_model_are_refused_before_a_store_is_built(
    tmp_path,
):
    learned = {"positions": {"kind": "learned"}}
    config = sampling_run(
        tmp_path, model=sampling_run(tmp_path).model.model_dump() | learned
    )
    with pytest.raises(MaxlmError) as error:
        prepare_data(config, tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    tokens = 1 + len(tokenizer.encode(config.samples.prompts[2]))
    assert str(error.value) == (
        f"samples.prompts.2: the prompt and samples.max_new_tokens=9 make {tokens + 9} "
        f"tokens; "
        "model.max_seq_len=32 allows 32; shorten the prompt, or ask for fewer new "
        "tokens"
    )
