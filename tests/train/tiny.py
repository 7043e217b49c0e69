"""Runs small enough to be trained many times, on text made here, and what they wrote
down."""

import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maxlm.train.records import read_records

ROOT = Path(__file__).parents[2]
TEXT = "the sun rises over a quiet sea and grey gulls turn slowly into wind"
# What must not depend on how a run got there.
SAME = ("loss", "grad_norm", "param_norm", "update_norm", "eval_loss", "tokens")
Part = dict[str, Any] | str | int | None
"""A part of a run's settings, as YAML would hold it."""


def environment(folder: Path) -> dict[str, str]:
    """For a process that runs maxlm: compiles quickly, and what another has compiled
    not at all."""
    from tests.models.building import QUICK

    flags = [f"--{name}={int(value)}" for name, value in QUICK.items()]
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def write_text(folder: Path, documents: int = 12, seed: int = 0) -> str:
    """Files of words drawn from a short list; the folder's path."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(documents):
        num_words = int(random.integers(100, 400))
        words = random.choice(TEXT.split(), num_words)
        text = " ".join([f"{number}:", *words])
        (folder / f"{number:02}.txt").write_text(text + "\n")
    return str(folder)


def settings(folder: Path, text: str, **parts: Part) -> dict[str, Any]:
    """A run in ``folder``/tiny, as YAML would hold it; ``parts`` replace whole ones."""
    return {
        "name": "tiny",
        "folder": str(folder),
        "compilation_cache": None,
        "model": {
            "vocab_size": 304,
            "num_layers": 2,
            "d_model": 32,
            "max_seq_len": 32,
            "remat": "none",
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
            "mlp": {"d_ff": 64},
        },
        "tokenizer": {"vocab_size": 300},
        "data": {
            "sources": [{"name": "text", "documents": [text]}],
            "heldout_fraction": 0.2,
            "seq_len": 32,
            "batch_size": 8,
            "workers": 0,
            "build_workers": 1,
        },
        "schedule": {"kind": "constant", "warmup_steps": 0, "learning_rate": 1e-2},
        "train": {"steps": 20},
        "checkpoint": {"every_steps": 10},
        **parts,
    }


def write_config(folder: Path, text: str, **parts: Part) -> str:
    """The same as a file, beside the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(folder, text, **parts)))
    return str(path)


def prepare(folder: Path) -> dict[str, Any]:
    """Makes a tokenizer and stores for many runs, and returns the ``data`` and
    ``tokenizer`` of their settings, without evaluation; ``data/text/heldout`` may be
    their ``heldout_store``."""
    from maxlm.config.load import load_config
    from maxlm.run.config import RunConfig
    from maxlm.run.prepare import prepare_data

    config = write_config(folder, write_text(folder / "text"))
    prepare_data(load_config(RunConfig, config).value, folder)
    source = {"name": "text", "store": str(folder / "data/text/train")}
    data = settings(folder, "")["data"] | {"sources": [source]}
    return {"data": data, "tokenizer": {"path": str(folder / "tokenizer")}}


def train(
    path: str | Path,
    *overrides: str,
    resume: str | Path | None = None,
    profile: tuple[int, int] | None = None,
) -> tuple[Any, list[str]]:
    """A run trained in this process, and the lines that it said."""
    from maxlm.config.load import load_config
    from maxlm.run.config import RunConfig
    from maxlm.train.program import train_model

    lines: list[str] = []
    config = load_config(RunConfig, path, overrides).value
    result = train_model(config, resume=resume, profile=profile, say=lines.append)
    return result, lines


def spoil_batches(monkeypatch: Any, change: Callable[[int, Any], Any]) -> None:
    """Let ``change`` have each batch of a run, with its number, before it is trained
    on."""
    from maxlm.checkpoint.skips import get_batch_index
    from maxlm.run import rollout_source

    original = rollout_source.open_training_batches

    @contextmanager
    def spoiled(
        setup: Any,
        source: Any,
        start: int,
        skips: Any,
        *,
        is_stop_requested: Callable[[], bool],
    ):
        with original(
            setup, source, start, skips, is_stop_requested=is_stop_requested
        ) as batches:
            yield (
                change(get_batch_index(step, skips), batch)
                for step, batch in enumerate(batches, start)
            )

    monkeypatch.setattr(rollout_source, "open_training_batches", spoiled)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return list(read_records(run / "metrics.jsonl"))


def read_results(run: Path) -> list[tuple[int, dict[str, float]]]:
    """What must not depend on how a run got there."""
    results = []
    for record in read_metrics(run):
        values = {name: record[name] for name in SAME if name in record}
        results.append((record["step"], values))
    return results


def read_events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] in kinds]
