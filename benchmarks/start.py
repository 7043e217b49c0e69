"""From typing the command to the first finished step, with an empty and a filled
compilation cache.

    python benchmarks/start.py [--config demo] [--rounds 3] [key=value ...]

Text is prepared beforehand, by a run of its own; each start is then a fresh process
that imports, builds, compiles (or finds its programs compiled) and takes one step.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = (
    "name=run",
    "train.steps=1",
    "schedule.warmup_steps=0",
    "samples.prompts=[]",
)


def first_step(folder: Path, config: str, settings: list[str]) -> float:
    """Seconds until the first step is reported; the run is then let go on to its
    end."""
    # The prepared text stays. A run whose records list a checkpoint that is gone would
    # refuse to start.
    run = folder / "run"
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    for records in ("events.jsonl", "metrics.jsonl"):
        (run / records).unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "maxlm.cli.main",
        "train",
        config,
        f"folder={folder}",
    ]
    began = time.perf_counter()
    with subprocess.Popen(
        [*command, f"compilation_cache={folder / 'xla'}", *SETTINGS, *settings],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines = []
        seconds = None
        for line in process.stderr:
            lines.append(line)
            if seconds is None and line.startswith("step 1/"):
                seconds = time.perf_counter() - began
    if process.returncode or seconds is None:
        raise SystemExit("".join(lines))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        first_step(folder, args.config, args.settings)
        for number in range(1, args.rounds + 1):
            shutil.rmtree(folder / "xla", ignore_errors=True)
            cold, warm = (
                first_step(folder, args.config, args.settings) for _ in range(2)
            )
            print(
                f"start {number}: empty cache {cold:.1f} s, filled cache {warm:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
