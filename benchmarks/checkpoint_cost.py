"""What checkpoints cost: training with one every 50 steps beside training with none.

    python benchmarks/checkpoint_cost.py --rounds 3

Trains the demo (`maxlm train demo`) for some steps without checkpoints, with asynchronous ones,
with synchronous ones and with local ones, in turn, several rounds, each in a folder of its own on
the text and tokenizer of the first. A run's speed is that of its steps from the second to the last,
with the time that training was held up by checkpoints, but for the one that ends every run. Prints
medians and their ratios to training without, and the rounds, which differ by several percent on a
machine that others share.

What one checkpoint adds is printed too, from within a run and so with less noise: the seconds that
training was held up (at the first one more: that compiles the fingerprints), and how much longer
the next steps took than the steps around them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

AFTER = 4  # steps that the writing of a checkpoint may reach into
AROUND = 10  # steps before it, and as many after those

KINDS = {
    "none": ["checkpoint.every_steps=0"],
    "asynchronous": ["checkpoint.every_steps=50"],
    "synchronous": ["checkpoint.every_steps=50", "checkpoint.asynchronous=false"],
    "local": ["checkpoint.every_steps=0", "checkpoint.local_every_steps=50"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Training with checkpoints beside without.")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--steps", type=int, default=260)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    rates: dict[str, list[float]] = {
        kind: [] for kind in {"none": 0} | dict.fromkeys(options.kinds)
    }
    added: dict[str, list[Added]] = {kind: [] for kind in rates}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train(options.config, folder, "prepared", 2, KINDS["none"])
        for number in range(options.rounds):
            # Each round in another order, so that none always has the warmest machine.
            turn = number % len(rates)
            kinds = [*rates][turn:] + [*rates][:turn]
            for kind in kinds:
                run = folder / f"{kind}-{number}"
                for part in ("data", "tokenizer"):
                    shutil.copytree(folder / "prepared" / part, run / part)
                settings = [*KINDS[kind]]
                if kind == "local":
                    settings.append(f"checkpoint.local_folder={folder / 'disk'}")
                os.sync()  # no run pays for what the one before it wrote
                train(options.config, folder, run.name, options.steps, settings)
                seconds, held = measured(run)
                rates[kind].append(len(seconds) / (sum(seconds.values()) + sum(held.values())))
                added[kind] += [add(seconds, held)] if len(held) > 1 else []
                print(f"round {number + 1}: {kind} {rates[kind][-1]:.3f} steps/s", flush=True)
                shutil.rmtree(run)
    base = median(rates["none"])
    print(f"{'checkpoints':14}{'steps/s':>10}{'of none':>10}   rounds")
    for kind, own in rates.items():
        each = " ".join(f"{value:.3f}" for value in own)
        print(f"{kind:14}{median(own):10.3f}{median(own) / base:10.3f}   {each}")
    print(f"{'one of them':14}{'held':>10}{'slower':>10}{'of 50':>10}   the first held, in seconds")
    for kind, own in added.items():
        if own:
            first, held, slower, step = (median(values) for values in zip(*own, strict=True))
            share = (held + slower) / (50 * step)
            print(f"{kind:14}{held:10.3f}{slower:10.3f}{share:10.2%}   {first:.3f}")
    return 0


def train(config: str, folder: Path, name: str, steps: int, settings: list[str]) -> None:
    command = [sys.executable, "-m", "maxlm.cli.main", "train", config, f"name={name}"]
    command += [f"folder={folder}", f"train.steps={steps}", "train.eval_every=0", *settings]
    # The evaluation at the end takes no part.
    command += ["samples.prompts=[]", "schedule.warmup_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def measured(run: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of all steps but the first, which compiles, and those that training was held up by
    the checkpoints of steps before the last."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {r["step"]: r["seconds"] for r in records if "seconds" in r and r["step"] > 1}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    saves = (e for e in events if e["event"] == "checkpoint" and e["step"] < max(seconds))
    return seconds, {e["step"]: e["seconds"] for e in saves}


class Added(NamedTuple):
    """What a run's checkpoints add, in seconds: the first one's hold, the others' means of hold and
    of slower steps, and a step's median."""

    first: float
    held: float
    slower: float
    step: float


def add(seconds: dict[int, float], held: dict[int, float]) -> Added:
    first, *later = sorted(held)
    slower = []
    for step in later:
        end = step + AFTER
        near = [*range(step - AROUND + 1, step + 1), *range(end + 1, end + AROUND + 1)]
        usual = median(seconds[at] for at in near if at in seconds)
        slower += [sum(seconds[at] - usual for at in range(step + 1, end + 1) if at in seconds)]
    others = fmean(held[step] for step in later)
    return Added(held[first], others, fmean(slower), median(seconds.values()))


if __name__ == "__main__":
    sys.exit(main())
