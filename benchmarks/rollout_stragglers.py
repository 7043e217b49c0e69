"""What rollouts that are begun ahead save where some samples are long: the engine's steps
for each rollout, and the tokens that a step gives.

    python benchmarks/rollout_stragglers.py [--rollouts 6] [--staleness 0 1 2 4]

A small model without training draws bytes; the end of a sample is made likely by a bias,
so that lengths spread as those of answers do, up to ten times the mean. Steps are
counted, and none is timed: a step of one sequence costs an accelerator about what one
of a full batch does. Lengths trained on are compared with those of the synchronous run
by a Kolmogorov-Smirnov test.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import ks_2samp

from maxlm.config.load import load_config
from maxlm.rl.program import train_policy
from maxlm.rl.rollouts.records import read_sample_log
from maxlm.run.config import RunConfig
from maxlm.train.records import read_records

MAX_NEW_TOKENS = 80
NUM_SAMPLES = 4
BATCH_SIZE = 64
MEAN_LENGTH = 8


def make_settings(folder: Path, staleness: int, num_rollouts: int) -> dict[str, Any]:
    """Returns a run's settings, as YAML would hold them."""
    text = folder / "text.txt"
    text.write_text("12+34=46\n" * 50)
    return {
        "name": f"staleness-{staleness}",
        "folder": str(folder),
        "model": {
            "vocab_size": 257,
            "num_layers": 1,
            "d_model": 16,
            "max_seq_len": 128,
            "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 16},
            "mlp": {"d_ff": 16},
        },
        "tokenizer": {"vocab_size": 257},
        "data": {
            "sources": [{"name": "text", "documents": [str(text)]}],
            "seq_len": MAX_NEW_TOKENS + 16,
            "batch_size": BATCH_SIZE,
            "workers": 0,
        },
        "task": {
            "kind": "grpo",
            "environment": {"kind": "addition"},
            "rewards": [{"kind": "length", "max_length": 80, "buffer": 40}],
            "rollouts": {
                "staleness": staleness,
                "sampling": {
                    "max_new_tokens": MAX_NEW_TOKENS,
                    # One token in MEAN_LENGTH of a flat distribution.
                    "logit_bias": {256: float(np.log(256 / (MEAN_LENGTH - 1)))},
                },
            },
            "num_samples": NUM_SAMPLES,
            "engine": {"max_sequences": BATCH_SIZE, "decode_steps": 4},
        },
        "schedule": {"kind": "constant", "warmup_steps": 0, "learning_rate": 1e-6},
        "train": {"steps": num_rollouts},
        "checkpoint": {"every_steps": 0},
    }


def run(folder: Path, staleness: int, num_rollouts: int) -> dict[str, Any]:
    """Trains, and returns what the last rollouts took; the first one fills the queue."""
    settings = make_settings(folder, staleness, num_rollouts)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    result = train_policy(load_config(RunConfig, path).value, say=lambda _: None)
    records = [
        record
        for record in read_records(result.folder / "metrics.jsonl")
        if "engine_steps" in record
    ][1:]
    lengths = [sample["length"] for sample in read_sample_log(result.folder)]
    steps = sum(record["engine_steps"] for record in records)
    num_tokens = sum(lengths[BATCH_SIZE:])
    return {
        "lengths": np.array(lengths),
        "steps": steps / len(records),
        "tokens": num_tokens / steps,
        "age": max(record.get("max_staleness", 0.0) for record in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=24)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    arguments = parser.parse_args()
    columns = ("staleness", "steps/rollout", "tokens/step", "oldest token", "KS p")
    print("  ".join(f"{name:>13}" for name in columns))
    with tempfile.TemporaryDirectory() as folder:
        reference: np.ndarray | None = None
        for staleness in arguments.staleness:
            figures = run(Path(folder), staleness, arguments.rollouts)
            lengths = figures["lengths"]
            reference = lengths if reference is None else reference
            p_value = ks_2samp(lengths, reference).pvalue
            print(
                f"{staleness:13}  {figures['steps']:13.1f}  {figures['tokens']:13.1f}"
                f"  {figures['age']:13.1f}  {p_value:13.3f}"
            )
    print(f"lengths: mean {lengths.mean():.1f}, most {lengths.max()}")


if __name__ == "__main__":
    main()
