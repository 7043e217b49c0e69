"""Promise: each method's recipe trains a chat model on a file of questions, and goes on
bit for bit where it was stopped."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from maxlm.rl.program import train_policy
from maxlm.run.config import RunConfig
from maxlm.run.load_config import load_run_config
from maxlm.train.program import TrainingResult, train_model
from tests.train import tiny

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.more,
    pytest.mark.usefixtures("compiled_once", "one_device"),
]

LENGTHS = "task.rewards=[{kind: length, max_length: 6, buffer: 5}]"
# Small.
CUT = (
    "compilation_cache=null",
    "data.seq_len=48",
    "data.batch_size=8",
    "data.build_workers=1",
    "train.max_device_rows=null",
    "schedule.warmup_steps=0",
    "schedule.learning_rate=1e-3",
    "reporting.tensorboard=false",
)
# Both tokens that end an answer are likely.
CUT_ROLLOUTS = (
    "task.rollouts.sampling.max_new_tokens=6",
    "task.rollouts.sampling.logit_bias={277: 3.0, 279: 3.0}",
    "task.engine.max_sequences=8",
    "train.steps=4",
    "checkpoint.every_steps=2",
)
# Settings of a method, FOLDER standing for where its runs are, and a metric of it that
# is not 0.
METHODS: dict[str, tuple[Sequence[str], str]] = {
    "ppo": (
        [
            "task.rewards.0.run=FOLDER/reward",
            "task.epochs=2",
            "task.minibatches=2",
            "task.kl_target=6.0",
        ],
        "value_loss",
    ),
    "rloo": ([LENGTHS], "kl"),
    "on_policy_distill": (["task.teacher=FOLDER/teacher"], "divergence"),
    "grpo_lora": ([LENGTHS, "task.kl_coef=0.1", "adapter.rank=2"], "kl"),
}


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """All that there is: the quickest to compile for."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device) -> Path:
    """With runs ``base``, ``teacher``, another model, and files of rows."""
    folder = tmp_path_factory.mktemp("recipes")
    settings = tiny.settings(folder, tiny.write_text(folder / "text", 3))
    settings["data"]["heldout_fraction"] = 0
    settings["model"] |= {"vocab_size": 288, "num_layers": 1, "max_seq_len": 48}
    settings |= {
        "tokenizer": {"vocab_size": 280, "chat": "chatml"},
        "train": {"steps": 1},
        "reporting": {"tensorboard": False},
    }
    for seed, name in enumerate(("base", "teacher")):
        config = RunConfig.model_validate(settings | {"name": name, "seed": seed})
        train_model(config, say=lambda _: None)
    questions = [{"prompt": f"{a}+{b}?"} for a in range(3) for b in range(5)]
    pairs = [row | {"chosen": "yes", "rejected": "no"} for row in questions]
    for name, rows in (("questions", questions), ("pairs", pairs)):
        text = "\n".join(map(json.dumps, rows))
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def make_settings(folder: Path, name: str, files: str) -> list[str]:
    return [
        *CUT,
        f"train.start_from={folder / 'base'}",
        f"folder={folder}",
        f"name={name}",
        f"{files}=[{folder / 'questions.jsonl'}]",
    ]


def train_reward_model(folder: Path) -> None:
    settings = make_settings(folder, "reward", "task.files")
    settings += [f"task.files=[{folder / 'pairs.jsonl'}]", "train.steps=1"]
    train_model(load_run_config("reward", settings), say=lambda _: None)


def train(folder: Path, method: str, name: str) -> TrainingResult:
    settings = make_settings(folder, name, "task.environment.files")
    own_settings, _ = METHODS[method]
    settings += CUT_ROLLOUTS
    settings += [text.replace("FOLDER", str(folder)) for text in own_settings]
    return train_policy(load_run_config(method, settings), say=lambda _: None)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_trains_and_resumes(method, folder):
    if method == "ppo":
        train_reward_model(folder)
    whole = train(folder, method, method)
    records = tiny.read_metrics(whole.folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        values = [value for value in record.values() if isinstance(value, float)]
        assert np.isfinite(values).all()
        assert record["grad_norm"] > 0
        # In the first step of a rollout engine and trainer are one model.
        assert record["engine_difference"] < 1e-5
    _, metric = METHODS[method]
    assert records[-1][metric] != 0

    cut = Path(f"{whole.folder}-cut")
    shutil.copytree(whole.folder, cut)
    shutil.rmtree(cut / "checkpoints" / "4")
    resumed = train(folder, method, cut.name)
    assert resumed.start_step == 2
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.state, resumed.state))
