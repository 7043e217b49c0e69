"""Steps of fine-tuning SmolLM2 on this CPU, ours beside PEFT's and transformers'
Trainer.

    python benchmarks/tune_step.py FOLDER [--rounds 5] [--steps 2] [--rows 4] [--length
    256]

FOLDER is the Hugging Face checkpoint (benchmarks/smollm2.py makes it). Full fine-tuning
and LoRA of rank 16 on every linear map; fp32, AdamW, rows full of conversation. Each
round times every contender once, one after the other; printed are medians of tokens/s
over the rounds, and the ratio's median and range over the rounds. The Trainer is timed
by its own callbacks, between the beginnings of its steps, its first two steps aside.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

RATE = 1e-4
Timer = Callable[[int], float]
"""Takes some steps; returns the seconds of one."""


def make_rows(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1_000, 40_000, (rows, length + 1))


def build_ours(folder: str, rows: np.ndarray, adapted: bool) -> Timer:
    from maxlm.run.global_batch import batch_sharding
    from maxlm.run.load_config import load_run_config
    from maxlm.run.setup import set_up_run
    from maxlm.run.warm_start import init_or_warm_start_state
    from maxlm.tune.program import convert_sources

    count = rows.shape[0]
    length = rows.shape[1] - 1
    home = tempfile.mkdtemp()
    settings = [f"folder={home}", f"data.seq_len={length}", f"data.batch_size={count}"]
    settings += [
        "train.max_device_rows=null",
        "mesh.fsdp=1",
        f"schedule.learning_rate={RATE}",
    ]
    settings += [
        "schedule.warmup_steps=0",
        "model.remat=none",
        f"train.start_from={folder}",
    ]
    recipe = load_run_config("sft_lora" if adapted else "sft", settings)
    setup = set_up_run(convert_sources(recipe), jax.devices()[:1])
    batch = {
        "tokens": rows[:, :-1].astype(np.int32),
        "targets": rows[:, 1:].astype(np.int32),
        "positions": np.broadcast_to(
            np.arange(length, dtype=np.int32), (count, length)
        ),
        "segment_ids": np.ones((count, length), np.int32),
        "weights": np.ones((count, length), np.float32),
    }
    sharding = batch_sharding(setup.placed.compute, setup.mesh)
    batch = {
        name: jax.device_put(array[None], sharding) for name, array in batch.items()
    }
    state = init_or_warm_start_state(setup)
    step = setup.jit_train_step()

    def run(steps: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
            float(metrics["loss"])
        return (time.perf_counter() - began) / steps

    return run


def build_trainer(folder: str, rows: np.ndarray, adapted: bool) -> Timer:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    if adapted:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    ids = torch.from_numpy(rows[:, :-1]).long()
    data = [{"input_ids": row, "labels": row.clone()} for row in ids]

    class Stopwatch(TrainerCallback):
        def __init__(self):
            self.begun: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun.append(time.perf_counter())

    def run(steps: int) -> float:
        watch = Stopwatch()
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(rows),
            max_steps=steps + 3,
            learning_rate=RATE,
            optim="adamw_torch",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[watch]).train()
        seconds = np.diff(watch.begun)[2:]
        return float(np.mean(seconds))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    rows = make_rows(options.rows, options.length)
    for adapted, name in ((False, "full"), (True, "LoRA, rank 16")):
        ours = build_ours(options.folder, rows, adapted)
        theirs = build_trainer(options.folder, rows, adapted)
        ours(1)
        pairs = [
            (ours(options.steps), theirs(options.steps)) for _ in range(options.rounds)
        ]
        rates = [
            rows[:, 1:].size / statistics.median(seconds)
            for seconds in zip(*pairs, strict=True)
        ]
        ratios = [peer_seconds / our_seconds for our_seconds, peer_seconds in pairs]
        print(
            f"{name}: maxlm {rates[0]:,.0f} tokens/s, Trainer {rates[1]:,.0f}; ratio "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
