"""Runs of ``maxlm rl`` small enough to be trained many times, and what they left."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maxlm.checkpoint.folder import FolderTier
from maxlm.config.load import load_config
from maxlm.rl.program import train_policy
from maxlm.rl.rollouts.records import RolloutFiles, read_sample_log
from maxlm.run.config import RunConfig
from maxlm.train.records import read_records
from tests.train import tiny

# What must not depend on how a run got there.
SAME = ("loss", "grad_norm", "reward", "entropy", "response_length", "engine_ratio")


def prepare(folder: Path) -> dict[str, Any]:
    """Makes a tokenizer for many runs, and returns the parts of their settings that
    name it."""
    from maxlm.run.prepare import prepare_data

    config = tiny.write_config(folder, tiny.write_text(folder / "text", 4))
    prepare_data(load_config(RunConfig, config).value, folder)
    return {"tokenizer": {"path": str(folder / "tokenizer")}}


def write_config(
    folder: Path,
    parts: dict[str, Any],
    *,
    rollouts: dict[str, Any] | None = None,
    **task: Any,
) -> str:
    """Writes the config of a run in ``folder``/tiny that learns which digit to say."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = tiny.settings(folder, "")
    settings["data"] = {"seq_len": 24, "batch_size": 24, "workers": 0}
    settings["task"] = {
        "kind": "grpo",
        "environment": {"kind": "addition", "num_digits": 1},
        "rewards": [{"kind": "format", "pattern": r"[0-4a-m].*"}],
        "rollouts": {
            "sampling": {"max_new_tokens": 12},
            **(rollouts or {}),
        },
        "num_samples": 3,
        "engine": {"max_sequences": 4, "page_size": 4, "prefill_tokens": 32},
        **task,
    }
    settings["sharding"] = {"max_unsharded": 1}
    settings["train"] = {"steps": 6}
    settings["checkpoint"] = {"every_steps": 2}
    settings |= parts
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def train(path: str, *overrides: str, resume: Path | None = None) -> Any:
    """Trains a run in this process; ``resume``: see
    :func:`~maxlm.rl.program.train_policy`."""
    config = load_config(RunConfig, path, overrides).value
    return train_policy(config, resume=resume, say=lambda _: None)


def read_run(folder: Path) -> dict[str, Any]:
    """Returns all that must be the same in two runs, by name."""
    run = folder / "tiny"
    left: dict[str, Any] = {"samples": [*read_sample_log(run)]}
    for record in read_records(run / "metrics.jsonl"):
        values = {name: record[name] for name in SAME if name in record}
        left.setdefault(f"metrics {record['step']}", {}).update(values)
    files = RolloutFiles(run)
    for number in files.list_numbers():
        arrays = files.read(number) or {}
        left |= {f"rollout {number} {name}": array for name, array in arrays.items()}
    # Of all arrays of the last state.
    with FolderTier(run / "checkpoints", read_only=True) as tier:
        left["fingerprints"] = tier.metadata()["fingerprints"]
    return left


def assert_same_run(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two runs are the same to the last bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
        else:
            assert actual[name] == value, (name, actual[name], value)
