"""Does a run that is killed again and again end like one that never was?

    python benchmarks/kill_and_resume.py --steps 300 --kills 10

Trains a small model without a break; then trains it again, killing it (SIGKILL) at random moments
of start-up, steps and saves, and starting it again each time. Compares bit by bit all arrays of
the last checkpoint, and everything in metrics.jsonl but times; also checks that no worker process
outlives a kill. Exits with 1 if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What differs between two runs of the same maths.
TIMES = ("seconds", "loader_wait", "tokens_per_second", "mfu", "mfu_full_attention")
TIMES += ("process_memory_peak", "device_memory_peak", "planned_seconds", "planned_mfu")
KINDS = ("start-up", "step", "save")
PATIENCE = 300.0
POLL = 0.001


@dataclass(frozen=True)
class Kill:
    """One kill, as it happened."""

    kind: str
    """What it was aimed at; "missed" if the run ended before."""
    seconds: float
    """After the process was started."""
    step: int
    """The last one recorded."""
    orphans: bool
    """Whether any worker process was left."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a run again and again, and compare.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=1, help="the loader's processes")
    parser.add_argument("--text", nargs="+", help="default: part of Python's standard library")
    parser.add_argument("--folder", type=Path, help="keep the runs here; default: nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        text = options.text or [f"{sysconfig.get_path('stdlib')}/asyncio/*.py"]
        config = write_config(
            folder, text, steps=options.steps, every=options.every, workers=options.workers
        )
        startup = unbroken(config, folder)
        choose = random.Random(options.seed)
        kills = broken(config, folder, options.steps, options.kills, startup, choose)
        return show(kills, differences(folder))


def write_config(folder: Path, text: list[str], *, steps: int, every: int, workers: int) -> Path:
    """A small run with all that a state can hold: moments, an average, accumulated gradients."""
    import yaml

    config = {
        "folder": str(folder),
        "compilation_cache": str(folder / "compiled"),
        "model": {
            "vocab_size": 320,
            "num_layers": 2,
            "d_model": 64,
            "max_seq_len": 64,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
            "mlp": {"d_ff": 192},
        },
        "tokenizer": {"vocab_size": 320},
        "data": {
            "sources": [{"name": "text", "documents": text}],
            "heldout_fraction": 0.1,
            "seq_len": 64,
            "batch_size": 16,
            "workers": workers,
            "build_workers": 1,
        },
        "schedule": {"warmup_steps": min(10, steps)},
        "train": {
            "steps": steps,
            "micro_batches": 2,
            "ema_decay": 0.9,
            "eval_every": every + every // 2,
            "eval_batches": 2,
        },
        "checkpoint": {"every_steps": every},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def unbroken(config: Path, folder: Path) -> float:
    """Train without a break; seconds from the start to the first step."""
    print("unbroken run ...", flush=True)
    with training(config, "unbroken") as process:
        began = time.monotonic()
        wait_until(lambda: last_step(folder / "unbroken") > 0, process)
        startup = time.monotonic() - began
        process.wait()
        check_done(process)
    return startup


def broken(
    config: Path, folder: Path, steps: int, count: int, startup: float, choose: random.Random
) -> list[Kill]:
    """Train with ``count`` kills, then to the end."""
    run = folder / "broken"
    kinds = [KINDS[i % len(KINDS)] for i in range(count)]
    choose.shuffle(kinds)
    # Not in the last steps, which would be over before they are seen.
    targets = sorted(choose.choices(range(1, max(2, steps * 9 // 10)), k=count))
    kills = []
    for kind, target in zip(kinds, targets, strict=True):
        before = starts(run)
        with training(config, "broken") as process:

            def reached(before: int = before, target: int = target) -> bool:
                return starts(run) > before and last_step(run) >= target

            kills.append(kill(process, run, kind, reached, startup, choose))
        print(f"killed: {kind} at step {kills[-1].step} ...", flush=True)
    with training(config, "broken") as process:
        process.wait()
        check_done(process)
    return kills


def kill(
    process: subprocess.Popen[bytes],
    run: Path,
    kind: str,
    reached: Callable[[], bool],
    startup: float,
    choose: random.Random,
) -> Kill:
    """Kill a run in start-up, or where a step is reached, or at the next save from there on."""
    began = time.monotonic()
    if kind == "start-up":
        wait_until(reached, process, choose.uniform(0, startup))
    else:
        wait_until(reached, process)
        if kind == "save":
            wait_until(lambda: saving(run / "checkpoints"), process)
        time.sleep(choose.uniform(0, 0.02))
    missed = process.poll() is not None
    process.kill()
    process.wait()
    seconds, deadline = time.monotonic() - began, time.monotonic() + PATIENCE / 10
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(POLL)
    return Kill("missed" if missed else kind, seconds, last_step(run), alive(process.pid))


@contextmanager
def training(config: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A ``maxlm train`` process, leading a process group; nothing of the group is left behind."""
    command = [sys.executable, "-m", "maxlm.cli.main", "train", str(config), f"name={name}"]
    with (
        (config.parent / f"{name}.log").open("ab") as log,
        subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            yield process
        finally:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)


def check_done(process: subprocess.Popen[bytes]) -> None:
    if process.returncode:
        sys.exit(f"a run failed with {process.returncode}: see its .log (--folder keeps it)")


def wait_until(
    happened: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = PATIENCE
) -> None:
    """Return when it has happened, the process has ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL)


def alive(group: int) -> bool:
    """Whether the process group has a living member; where there is no /proc, also a dead one."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    if not Path("/proc/self/stat").exists():
        return True
    return any(state_and_group(stat) == group for stat in Path("/proc").glob("[0-9]*/stat"))


def state_and_group(stat: Path) -> int | None:
    """The group of a process that is no zombie."""
    try:
        state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(group)


def starts(run: Path) -> int:
    """How often training has begun or gone on."""
    path = run / "events.jsonl"
    return sum(b'"start"' in e or b'"resume"' in e for e in lines(path))


def last_step(run: Path) -> int:
    """The last one recorded, 0 if there is none."""
    records = lines(run / "metrics.jsonl")
    return json.loads(records[-1])["step"] if records else 0


def lines(path: Path) -> list[bytes]:
    """The complete lines of a file that may be growing, or not be there yet."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def saving(checkpoints: Path) -> bool:
    """Whether Orbax is writing one: its folder has a temporary name until it is complete."""
    return any(not path.name.isdigit() for path in checkpoints.glob("*"))


def differences(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """What was compared → (how many, those that differ)."""
    arrays = [final_arrays(folder / name) for name in ("unbroken", "broken")]
    records = [timeless(folder / name / "metrics.jsonl") for name in ("unbroken", "broken")]
    wrong = [n for n in arrays[0] if arrays[0][n].tobytes() != arrays[1][n].tobytes()]
    numbered = enumerate(zip(*records, strict=False))
    odd = [f"line {i + 1} ({a} became {b})" for i, (a, b) in numbered if a != b]
    if len(records[0]) != len(records[1]):
        odd.append(f"{len(records[0])} lines became {len(records[1])}")
    last, again = ([r for r in run if "loss" in r][-1] for run in records)
    apart = [name for name in {**last, **again} if last.get(name) != again.get(name)]
    return {
        "arrays of the last checkpoint": (len(arrays[0]), wrong),
        "metrics of the last step": (len(last), apart),
        "records in metrics.jsonl": (len(records[0]), odd),
    }


def final_arrays(run: Path) -> dict[str, Any]:
    import numpy as np

    from maxlm.config import load
    from maxlm.programs.setup import set_up
    from maxlm.run import RunConfig
    from maxlm.train.checkpoint import Checkpointer, named_leaves

    config = load(RunConfig, run / "config.yaml").value
    with Checkpointer(run / "checkpoints", read_only=True) as keeper:
        state = keeper.restore(config.train.steps, set_up(config).abstract_state)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def timeless(metrics: Path) -> list[dict[str, Any]]:
    from maxlm.train.records import read_records

    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_records(metrics)]


def show(kills: list[Kill], compared: dict[str, tuple[int, list[str]]]) -> int:
    """Print both tables; the exit code."""
    from rich.console import Console
    from rich.table import Table

    done = Table("kill", "aimed at", "after", "last step recorded", "workers left")
    for number, each in enumerate(kills, 1):
        left = "yes" if each.orphans else "none"
        done.add_row(str(number), each.kind, f"{each.seconds:.1f} s", str(each.step), left)
    same = Table("compared with the unbroken run", "how many", "different")
    for what, (count, wrong) in compared.items():
        same.add_row(what, str(count), ", ".join(wrong[:5]) or "none")
    console = Console(width=100, highlight=False)
    console.print(done, same)
    return int(any(wrong for _, wrong in compared.values()) or any(k.orphans for k in kills))


if __name__ == "__main__":
    sys.exit(main())
