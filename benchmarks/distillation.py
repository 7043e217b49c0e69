"""Compare students that learn from a teacher and from text alone, at equal steps.

    python benchmarks/distillation.py [--steps 400] [--teacher-steps 400] [--folder DIR]

A teacher is trained on the Python standard library's source, then a smaller student
from each of three seeds, on the same batches: by cross-entropy, and by KL(teacher ‖
student). Prints the cross-entropy of held-out text, in nats a token.
"""

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.run.config import RunConfig
from maxlm.train.program import train_model

SEEDS = (0, 1, 2)
TEACHER: dict[str, Any] = {"num_layers": 3, "d_model": 96, "heads": 4, "d_ff": 256}
STUDENT: dict[str, Any] = {"num_layers": 2, "d_model": 32, "heads": 2, "d_ff": 96}
VOCAB = 512
TEXT = f"{sysconfig.get_path('stdlib')}/*.py"


def make_settings(
    folder: Path, name: str, sizes: dict[str, Any], steps: int, batch: int, seq_len: int
) -> dict[str, Any]:
    heads = {"num_heads": sizes["heads"], "num_kv_heads": sizes["heads"]}
    model = {
        "vocab_size": VOCAB,
        "max_seq_len": 64,
        "attention": heads | {"head_dim": 16},
    }
    model |= {"num_layers": sizes["num_layers"], "d_model": sizes["d_model"]}
    model |= {"mlp": {"d_ff": sizes["d_ff"]}, "tie_embeddings": True, "remat": "none"}
    return {
        "name": name,
        "folder": str(folder),
        "model": model,
        "tokenizer": {"vocab_size": VOCAB, "sample_bytes": 2_000_000},
        "data": {
            "sources": [{"name": "text", "documents": [TEXT]}],
            "heldout_fraction": 0.01,
            "seq_len": seq_len,
            "batch_size": batch,
            "workers": 0,
        },
        "optimizer": {"kind": "adamw"},
        "schedule": {"kind": "cosine", "learning_rate": 4e-3, "warmup_steps": 20},
        "train": {"steps": steps},
        "reporting": {"tensorboard": False},
        "checkpoint": {"every_steps": 0},
        "compute_dtype": "float32",
    }


def train(settings: dict[str, Any]) -> float:
    """Returns the cross-entropy of held-out text after a run."""
    result = train_model(RunConfig.model_validate(settings), say=lambda _: None)
    (heldout,) = result.heldout.values()
    return float(heldout["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=Path("runs/distillation"))
    options = parser.parse_args()
    folder: Path = options.folder
    teacher = folder / "teacher"
    entropy = train(
        make_settings(folder, "teacher", TEACHER, options.teacher_steps, 16, 64)
    )
    print(f"teacher: {entropy:.4f}", flush=True)
    stores = {"store": str(teacher / "data/text/train")}
    heldout = str(teacher / "data/text/heldout")
    learnt = {"kind": "distill_text", "teacher": str(teacher)}
    tasks = {"cross-entropy": {"kind": "clm"}, "teacher": learnt}
    entropies: dict[str, list[float]] = {name: [] for name in tasks}
    for seed in SEEDS:
        for number, (name, task) in enumerate(tasks.items()):
            run_name = f"student-{number}-{seed}"
            settings = make_settings(folder, run_name, STUDENT, options.steps, 2, 64)
            source = {"name": "text", "heldout_store": heldout, **stores}
            settings["data"] |= {"sources": [source]}
            settings |= {"tokenizer": {"path": str(teacher / "tokenizer")}}
            entropies[name].append(train(settings | {"task": task, "seed": seed}))
        values = {name: by_seed[-1] for name, by_seed in entropies.items()}
        print(
            f"seed {seed}:",
            *(f"{n} {v:.4f}" for n, v in values.items()),
            sep="  ",
            flush=True,
        )
    base = np.array(entropies["cross-entropy"])
    for name in list(tasks)[1:]:
        gains = 1 - np.array(entropies[name]) / base
        print(
            f"{name}: {gains.mean():.1%} below cross-entropy alone (least "
            f"{gains.min():.1%})"
        )


if __name__ == "__main__":
    main()
