"""One device, eight devices and two processes of four train the same model, and each resumes from
another's checkpoint."""

import json
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from maxlm.train.records import read_records
from tests.ports import free_port
from tests.programs import tiny

WORKER = Path(__file__).with_name("train_worker.py")
STEPS, SAVED_AT = 20, 10
SPLIT = "data: 2, fsdp: 2, tensor: 2"
# layout → (devices a process, processes, mesh)
LAYOUTS = {"one": (1, 1, "fsdp: 1"), "eight": (8, 1, SPLIT), "two": (4, 2, SPLIT)}


def start(folder: Path, config: str, layout: str, runs: list[str]) -> list[subprocess.Popen]:
    devices, processes, mesh = LAYOUTS[layout]
    port = free_port() if processes > 1 else 0
    return [
        subprocess.Popen(
            [sys.executable, WORKER, config, str(devices), str(port), str(process), mesh, *runs],
            stdout=(folder / f"{layout}-{process}.log").open("a"),
            stderr=subprocess.STDOUT,
            env=tiny.environment(folder),
        )
        for process in range(processes)
    ]


def train(folder: Path, config: str, runs: dict[str, list[str]]) -> None:
    """Train each layout's runs; layouts at the same time."""
    processes = {layout: start(folder, config, layout, names) for layout, names in runs.items()}
    try:
        for layout, started in processes.items():
            for number, process in enumerate(started):
                log = folder / f"{layout}-{number}.log"
                assert process.wait() == 0, log.read_text()[-3000:]
                assert log.read_text().endswith("done\n")
    finally:
        for process in chain.from_iterable(processes.values()):
            process.kill()


def losses(run: Path) -> dict[int, float]:
    records = [r for r in read_records(run / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    return {r["step"]: r["loss"] for r in records}


def test_layouts_agree_and_resume_from_each_others_checkpoints(tmp_path):
    text = tiny.write_text(tmp_path / "text")
    config = tiny.write_config(
        tmp_path, text, train={"steps": STEPS, "ema_decay": 0.9, "micro_batches": 2}
    )
    train(tmp_path, config, {layout: [layout] for layout in LAYOUTS})
    want = losses(tmp_path / "one")
    for layout in LAYOUTS:
        assert losses(tmp_path / layout) == pytest.approx(want, rel=1e-5), layout
    assert want[STEPS] < want[1] - 0.5

    pairs = {}
    for writer, reader in (("one", "eight"), ("eight", "two"), ("two", "one")):
        run = tmp_path / f"{writer}-{reader}"
        shutil.copytree(tmp_path / writer, run)
        shutil.rmtree(run / "checkpoints" / str(STEPS))
        pairs[reader] = [run.name]
    train(tmp_path, config, pairs)
    for reader, runs in pairs.items():
        for name in runs:
            assert losses(tmp_path / name) == pytest.approx(want, rel=1e-5), name
            kinds = [json.loads(e)["event"] for e in (tmp_path / name / "events.jsonl").open()]
            kinds = [k for k in kinds if k in ("start", "resume", "checkpoint", "stop")]
            begun = ["start", "checkpoint", "checkpoint", "stop"]
            assert kinds == [*begun, "resume", "checkpoint", "stop"]
        log = (tmp_path / f"{reader}-0.log").read_text()
        assert log.count(f"resuming from step {SAVED_AT} in ") == 1
    assert "resuming" not in (tmp_path / "two-1.log").read_text()
