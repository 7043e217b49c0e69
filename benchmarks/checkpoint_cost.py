"""What checkpoints cost: training with one every 50 steps beside training with none.

    python benchmarks/checkpoint_cost.py --rounds 3

Trains the demo (`maxlm train demo`) for some steps without checkpoints, with asynchronous ones,
with synchronous ones and with local ones, in turn, several rounds, each in a folder of its own on
the text and tokenizer of the first. A run's speed is that of its steps from the second to the last,
with the time that training was held up by checkpoints, but for the one that ends every run. Prints
medians and their ratios to training without.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

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
                train(options.config, folder, run.name, options.steps, settings)
                rates[kind].append(rate(run))
                print(f"round {number + 1}: {kind} {rates[kind][-1]:.3f} steps/s", flush=True)
                shutil.rmtree(run)
    base = median(rates["none"])
    print(f"{'checkpoints':14}{'steps/s':>10}{'of none':>10}   rounds")
    for kind, own in rates.items():
        each = " ".join(f"{value:.3f}" for value in own)
        print(f"{kind:14}{median(own):10.3f}{median(own) / base:10.3f}   {each}")
    return 0


def train(config: str, folder: Path, name: str, steps: int, settings: list[str]) -> None:
    command = [sys.executable, "-m", "maxlm.cli.main", "train", config, f"name={name}"]
    command += [f"folder={folder}", f"train.steps={steps}", "train.eval_every=0", *settings]
    # The evaluation at the end takes no part.
    command += ["samples.prompts=[]", "schedule.warmup_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def rate(run: Path) -> float:
    """Steps a second, of all but the first, which compiles."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [r["seconds"] for r in records if "seconds" in r and r["step"] > 1]
    last = max(r["step"] for r in records)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    held = [e["seconds"] for e in events if e["event"] == "checkpoint" and e["step"] < last]
    return len(seconds) / (sum(seconds) + sum(held))


if __name__ == "__main__":
    sys.exit(main())
