"""The cost of checkpoints: steps with one in every 50 and steps without one, alternately
in one run.

    python benchmarks/checkpoint_cost.py --kinds asynchronous

Trains the demo (`maxlm train demo`) with a checkpoint every 100 steps: fifty steps that
begin with one are training with a checkpoint every 50 steps, the next fifty are
training with none. Their time is that of the steps and what training was held up by the
checkpoint. Each fifty with is compared with the mean of the fifty before and the fifty
after it, so that other programs slow both; whole runs differ by more than checkpoints
cost. The first checkpoint, which compiles the fingerprints, is left out of the ratio
and printed separately.

Prints steps per second, the median ratio and the interval that holds it with 95%
confidence (by ranks, of no assumed distribution), and what one checkpoint adds: the
seconds that training was held up, and those that the fifty took longer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from math import sqrt
from pathlib import Path
from statistics import median

BLOCK = 50
KINDS = {
    "asynchronous": [f"checkpoint.every_steps={2 * BLOCK}"],
    "synchronous": [
        f"checkpoint.every_steps={2 * BLOCK}",
        "checkpoint.asynchronous=false",
    ],
    "local": [
        "checkpoint.every_steps=0",
        f"checkpoint.local_every_steps={2 * BLOCK}",
        "checkpoint.local_folder={folder}/disk",
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Training with checkpoints beside without."
    )
    parser.add_argument("--config", default="demo")
    parser.add_argument(
        "--pairs", type=int, default=20, help="of fifty steps with and without"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    print(
        f"{'':14}{'none':>8}{'with':>8} steps/s   of none   first, held, longer: "
        f"seconds"
    )
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as temporary:
            settings = [setting.format(folder=temporary) for setting in KINDS[kind]]
            run = train(options.config, Path(temporary), options.pairs, settings)
            print(f"{kind:14}{summary(*measured(run))}", flush=True)
    return 0


def train(config: str, folder: Path, pairs: int, settings: list[str]) -> Path:
    """A run's folder, of as many pairs as are asked for after the first
    checkpoint's."""
    command = [sys.executable, "-m", "maxlm.cli.main", "train", config, "name=run"]
    command += [f"folder={folder}", f"train.steps={BLOCK * (2 * pairs + 4)}", *settings]
    command += ["train.eval_every=0", "samples.prompts=[]", "schedule.warmup_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return folder / "run"


def measured(run: Path) -> tuple[list[float], dict[int, float]]:
    """Seconds of each step, from the first on, and by step those that a checkpoint held
    it up."""
    records = [
        json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()
    ]
    seconds = [record["seconds"] for record in records if "seconds" in record]
    events = [
        json.loads(text) for text in (run / "events.jsonl").read_text().splitlines()
    ]
    saves = (event for event in events if event["event"] == "checkpoint")
    return seconds, {
        save["step"]: save["seconds"] for save in saves if save["step"] < len(seconds)
    }


def summary(seconds: list[float], wait_seconds: dict[int, float]) -> str:
    """Of all checkpoints but the first."""
    first, *later = sorted(wait_seconds)
    without, with_one, ratios, longer = [], [], [], []
    for step in later:
        before, after = (
            sum(seconds[step - BLOCK : step]),
            sum(seconds[step + BLOCK :][:BLOCK]),
        )
        without.append((before + after) / 2)
        with_one.append(wait_seconds[step] + sum(seconds[step:][:BLOCK]))
        ratios.append(without[-1] / with_one[-1])
        longer.append(with_one[-1] - without[-1])
    ratios.sort()
    count = len(ratios)
    rank = max(
        int(count / 2 - 0.98 * sqrt(count)), 0
    )  # 1.96 deviations of a binomial with p = 1/2
    low, high = ratios[rank], ratios[count - 1 - rank]
    rate_without, rate_with = (BLOCK / median(times) for times in (without, with_one))
    usual = median(wait_seconds[step] for step in later)
    return (
        f"{rate_without:8.3f}{rate_with:8.3f}           {median(ratios):.3f} ({low:.3f} to "
        f"{high:.3f}, {count})"
        f"   {wait_seconds[first]:.3f}, {usual:.3f}, {median(longer):.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
