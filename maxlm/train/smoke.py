"""Does a config work? The whole life of a model in a minute, on whatever device is
here."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import layer_group_shapes
from maxlm.config.sampling import SamplingConfig
from maxlm.data.batch_source import BatchSource
from maxlm.data.documents import find_files
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer
from maxlm.inference.generate import generate_tokens
from maxlm.models.params import flatten_names
from maxlm.optim.state import TrainState
from maxlm.plan.layout import compute_run_layout
from maxlm.run.config import RunConfig
from maxlm.run.prepare import make_source_inputs, read_vocab_size
from maxlm.run.setup import (
    RunSetup,
    open_training_batches,
    set_up_run,
    use_compilation_cache,
)
from maxlm.run.warm_start import load_frozen_models
from maxlm.sharding import count_min_devices, mesh_sizes
from maxlm.tasks import Vocabulary
from maxlm.tasks.rows import RowTask

STEPS, SAVED_AT, NEW_TOKENS = 10, 5, 8
# Where few tokens are targets, it takes more of them to learn as much.
SPARSE_STEPS = 30
# The least share by which the loss must fall: more than chance, far less than what a
# model learns.
FALL = 0.1
VOCAB, SEQ_LEN, LAYERS, HEAD_DIM = 512, 64, 2, 16
# Ids of its text.
USED = 32


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    passed: bool
    detail: str


def shrink_config(config: RunConfig, num_devices: int) -> RunConfig:
    """Makes a small run of the same kinds of layers, ratios, task, optimizer and
    packing.

    Depth, widths, vocabulary and sequence shrink; precision stays. The mesh is this
    machine's.
    """
    task = config.task.for_small_model()
    steps = STEPS if task.predicts_every_token else SPARSE_STEPS
    sizes = {"vocab_size": VOCAB, "num_layers": LAYERS, "head_dim": HEAD_DIM}
    small = config.model.shrunk(**sizes, seq_len=max(task.row_lengths(SEQ_LEN)))
    micro = min(config.train.micro_batches, 2)
    data = {"seq_len": SEQ_LEN, "batch_size": 4 * micro * num_devices, "workers": 0}
    train = {"steps": steps, "micro_batches": micro, "max_device_rows": None}
    # At which a tiny model trains stably, with an effect within ten steps.
    rate = 1e-3 if config.optimizer.kind == "lion" else 1e-2
    schedule = {"kind": "constant", "warmup_steps": 0, "learning_rate": rate}
    changes: dict[str, Any] = {
        "tune": {},  # the model has its scaling
        "model": small,
        "task": task,
        "mesh": {"data": 1, "fsdp": num_devices},
        "samples": {},
        "data": config.data.model_copy(update=data),
        "train": config.train.model_copy(update=train),
        "schedule": config.schedule.model_copy(update=schedule),
    }
    return RunConfig.model_validate({**dict(config), **changes})


class CountingTokenSource:
    """A token source that is quickly learnt: documents that count up and around, in few
    tokens."""

    path, offsets_sha256 = None, ""

    def __init__(self, vocab_size: int):
        used = min(vocab_size, USED)
        random = np.random.default_rng(0)
        marks = np.arange(vocab_size) >= used
        self.vocabulary = Vocabulary(
            vocab_size, (), min(used, vocab_size - 1), marks, ~marks
        )
        draws = random.integers((20, 0, 1), (100, used, 4), (512, 3)).tolist()
        texts = [
            (start + step * np.arange(length)) % used for length, start, step in draws
        ]
        self.offsets = np.cumsum([0, *map(len, texts)])
        self._tokens = np.concatenate(texts).astype(np.uint32)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def read_many(
        self, starts: Sequence[int], stops: Sequence[int]
    ) -> list[np.ndarray]:
        return [self._tokens[a:b] for a, b in zip(starts, stops, strict=True)]


def make_counting_batch_source(config: RunConfig) -> BatchSource:
    """Makes a task's batches of :class:`CountingTokenSource`."""
    text = CountingTokenSource(config.model.vocab_size)
    digits = [b"0 1 2 3 4 5 6 7 8 9 " * 20]
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=257), digits)
    inputs = make_source_inputs(
        config, tokenizer, {"text": text}, vocabulary=text.vocabulary
    )
    return config.task.batch_source(replace(inputs, mixing={"text": 1.0}))


def write_counting_rows(path: Path) -> None:
    """Writes rows of every form that a task reads: numbers to count on from, rightly or
    not."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(256):
            right = " ".join(str((i + k) % 10) for k in range(4, 10))
            wrong = " ".join(str(i % 10) for _ in range(4, 10))
            row = {"prompt": " ".join(str((i + k) % 10) for k in range(4))}
            row |= {"chosen": f" {right}", "rejected": f" {wrong}", "label": i % 2 == 0}
            row |= {"completion": f" {right if i % 2 == 0 else wrong}"}
            file.write(json.dumps(row) + "\n")


def smoke(config: RunConfig, devices: Sequence[Any] | None = None) -> Iterator[Check]:
    """Shrink a run to these devices (default: all) and try it, yielding each check as
    it is made.

    Before the first check the run itself is looked at, in its own size, without
    devices: whatever a mesh, a schedule, a batch, a tokenizer's size or missing
    documents make impossible raises a MaxlmError.
    """
    compute_run_layout(config, mesh_sizes(config.mesh, count_min_devices(config.mesh)))
    config.task.check_vocab_size(read_vocab_size(config), config.model.vocab_size)
    for source in config.data.sources:
        if source.documents:
            find_files(source)
    use_compilation_cache(config)
    devices = jax.devices() if devices is None else devices
    small = shrink_config(config, len(devices))
    # Other models are as small as the trained one.
    setup = set_up_run(
        small, devices, frozen_sources=dict.fromkeys(small.task.frozen_models())
    )
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(small.task, RowTask):
            rows = Path(folder, "rows.jsonl")
            write_counting_rows(rows)
            task = small.task.model_copy(update={"files": (str(rows),)})
            setup = replace(setup, config=small.model_copy(update={"task": task}))
        yield from _checks(setup, Path(folder, "checkpoints"))


def _checks(setup: RunSetup, folder: Path) -> Iterator[Check]:
    state = setup.init_train_state()
    state = replace(state, frozen=load_frozen_models(setup, RunSetup.init_train_state))
    count = sum(spec.size for spec in flatten_names(setup.specs).values())
    right = jax.tree.all(
        jax.tree.map(lambda x, s: x.sharding == s, state, setup.shardings)
    )
    yield Check(
        "parameters lie as planned", right, f"{count:,} on {setup.mesh.size} device(s)"
    )

    step = setup.jit_train_step()
    steps = setup.config.train.steps
    began = time.perf_counter()
    state, first = _run(setup, step, state, SAVED_AT)
    saved = jax.tree.map(np.asarray, state)
    detail = (
        f"{SAVED_AT} steps in {time.perf_counter() - began:.1f} s, compilation included"
    )
    yield Check("the step compiles and runs", len(first) == SAVED_AT, detail)

    with FolderTier(
        folder, layer_groups=layer_group_shapes(setup.specs)
    ) as checkpoints:
        checkpoints.save(SAVED_AT, replace(state, frozen={}), {})
        state, rest = _run(setup, step, state, steps)
        losses = first + rest
        finite = all(map(math.isfinite, losses))
        yield Check("losses are finite", finite, f"{losses[0]:.3f} at first")
        falls = sum(losses[-3:]) / 3 < (1 - FALL) * losses[0]
        yield Check("the loss falls", falls, f"{losses[0]:.3f} → {losses[-1]:.3f}")
        checkpoints.wait()
        restored = checkpoints.restore(
            SAVED_AT, replace(setup.abstract_state, frozen={})
        )
    restored = replace(restored, frozen=state.frozen)
    equal = jax.tree.all(jax.tree.map(np.array_equal, saved, restored))
    yield Check("a checkpoint restores bit for bit", equal, f"step {SAVED_AT}")
    _, again = _run(setup, step, restored, steps)
    yield Check(
        "restored steps repeat exactly",
        again == rest,
        f"steps {SAVED_AT + 1} to {steps}",
    )

    if setup.config.model.transformer_type == "encoder":
        return  # it names tokens, and continues nothing
    sampling = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS)
    (tokens,) = generate_tokens(setup.model, state.params, [[1, 2, 3]], sampling)
    right = len(tokens) == NEW_TOKENS and max(tokens) < setup.config.model.vocab_size
    yield Check("the model generates", right, " ".join(map(str, tokens)))


def _run(
    setup: RunSetup, step: Callable[..., Any], state: TrainState, stop: int
) -> tuple[TrainState, list[float]]:
    """Steps up to ``stop``, and their losses."""
    start = int(state.step)
    losses = []
    with open_training_batches(
        setup, make_counting_batch_source(setup.config), start
    ) as batches:
        for batch in islice(batches, stop - start):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return state, losses
