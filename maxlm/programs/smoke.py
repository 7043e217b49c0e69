"""Does a config work? The whole life of a model in a minute, on whatever device is here."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.corpus import find_files
from maxlm.inference.generate import generate
from maxlm.inference.sampling import SamplingConfig
from maxlm.models.params import flatten_names
from maxlm.plan.layout import lay_out_run
from maxlm.programs.feed import training_batches
from maxlm.programs.prepare import planned_vocab
from maxlm.programs.setup import Setup, set_up, use_compilation_cache
from maxlm.run import RunConfig, vocab_fits
from maxlm.sharding import count_min_devices, mesh_sizes
from maxlm.tasks import Vocabulary, batch_arrays
from maxlm.train.checkpoint import Checkpointer, group_sizes
from maxlm.train.state import TrainState

STEPS, SAVED_AT, NEW_TOKENS = 10, 5, 8
# Where few tokens are targets, it takes more of them to learn as much.
SPARSE_STEPS = 30
# The least share by which the loss must fall: more than chance, far less than what a model learns.
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


def shrink(config: RunConfig, num_devices: int) -> RunConfig:
    """A small run of the same structure: the same layers, ratios, objective, optimizer and packing.

    Depth, widths, vocabulary and sequence shrink; precision stays. The mesh is this machine's.
    """
    # Marks and lengths that were given fit the model's own size.
    lengths = [n for n in type(config.objective).model_fields if n.endswith("_len")]
    fitted = dict.fromkeys([*config.objective.marks, *lengths])
    objective = config.objective.model_copy(update=fitted)
    steps = STEPS if objective.kind == "clm" else SPARSE_STEPS
    longest = max(length for length, _ in batch_arrays(objective, SEQ_LEN).values())
    small = config.model.shrunk(
        vocab_size=VOCAB, num_layers=LAYERS, head_dim=HEAD_DIM, seq_len=longest
    )
    micro = min(config.train.micro_batches, 2)
    data = {"seq_len": SEQ_LEN, "batch_size": 4 * micro * num_devices, "workers": 0}
    changes: dict[str, Any] = {
        "model": small,
        "objective": objective,
        "mesh": {"data": 1, "fsdp": num_devices},
        "samples": {},
        "data": config.data.model_copy(update=data),
        "train": config.train.model_copy(
            update={"steps": steps, "micro_batches": micro, "max_device_rows": None}
        ),
        "schedule": config.schedule.model_copy(
            update={
                "kind": "constant",
                "warmup_steps": 0,
                "learning_rate": config.optimizer.brisk_rate,
            }
        ),
    }
    return RunConfig.model_validate({**dict(config), **changes})


class CountingText:
    """A token source that is quickly learnt: documents that count up and around, in few tokens."""

    path, offsets_sha256 = None, ""

    def __init__(self, vocab_size: int, documents: int = 512, seed: int = 0):
        random = np.random.default_rng(seed)
        lengths = random.integers(20, 100, documents)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        used = min(vocab_size, USED)
        marks = np.arange(vocab_size) >= used
        self.vocabulary = Vocabulary(vocab_size, used, (), min(used, vocab_size - 1), marks, ~marks)
        starts, steps = random.integers(used, size=documents), random.integers(1, 4, documents)
        self._tokens = np.concatenate(
            [
                (start + step * np.arange(length)) % used
                for start, step, length in zip(starts, steps, lengths, strict=True)
            ]
        ).astype(np.uint32)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        return [self._tokens[a:b] for a, b in zip(starts, stops, strict=True)]


def smoke(config: RunConfig, devices: Sequence[Any] | None = None) -> Iterator[Check]:
    """Shrink a run to these devices (default: all) and try it, yielding each check as it is made.

    Before the first check the run itself is looked at, in its own size, without devices: whatever
    a mesh, a schedule, a batch, a tokenizer's size or missing documents make impossible raises a
    MaxlmError.
    """
    lay_out_run(config, mesh_sizes(config.mesh, count_min_devices(config.mesh)))
    vocab_fits(config, planned_vocab(config))
    for source in config.data.sources:
        if source.documents:
            find_files(source.corpus())
    use_compilation_cache(config)
    devices = jax.devices() if devices is None else devices
    setup = set_up(shrink(config, len(devices)), devices)
    with tempfile.TemporaryDirectory() as folder:
        yield from _checks(setup, Path(folder))


def _checks(setup: Setup, folder: Path) -> Iterator[Check]:
    state = setup.init()
    count = sum(spec.size for spec in flatten_names(setup.specs).values())
    right = jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state, setup.shardings))
    yield Check("parameters lie as planned", right, f"{count:,} on {setup.mesh.size} device(s)")

    step, steps = setup.step_function(), setup.config.train.steps
    began = time.perf_counter()
    state, first = _run(setup, step, state, SAVED_AT)
    saved = jax.tree.map(np.asarray, state)
    seconds = time.perf_counter() - began
    detail = f"{SAVED_AT} steps in {seconds:.1f} s, compilation included"
    yield Check("the step compiles and runs", len(first) == SAVED_AT, detail)

    with Checkpointer(folder, grouped=group_sizes(setup.specs)) as keeper:
        keeper.save(SAVED_AT, state, {}, force=True)
        state, rest = _run(setup, step, state, steps)
        losses = first + rest
        finite = all(map(math.isfinite, losses))
        yield Check("losses are finite", finite, f"{losses[0]:.3f} at first")
        falls = sum(losses[-3:]) / 3 < (1 - FALL) * losses[0]
        yield Check("the loss falls", falls, f"{losses[0]:.3f} → {losses[-1]:.3f}")
        keeper.wait()
        restored = keeper.restore(SAVED_AT, setup.abstract_state)
    equal = jax.tree.all(jax.tree.map(np.array_equal, saved, restored))
    yield Check("a checkpoint restores bit for bit", equal, f"step {SAVED_AT}")
    _, again = _run(setup, step, restored, steps)
    yield Check("restored steps repeat exactly", again == rest, f"steps {SAVED_AT + 1} to {steps}")

    if setup.config.model.architecture == "encoder":
        return  # it names tokens, and continues nothing
    tokens = _generate(setup, state)
    right = len(tokens) == NEW_TOKENS and max(tokens) < setup.config.model.vocab_size
    yield Check("the model generates", right, " ".join(map(str, tokens)))


def _run(
    setup: Setup, step: Callable[..., Any], state: TrainState, stop: int
) -> tuple[TrainState, list[float]]:
    """Steps up to ``stop``, and their losses."""
    text = CountingText(setup.config.model.vocab_size)
    start, losses = int(state.step), []
    feed = training_batches(setup, {"text": text}, {"text": 1.0}, text.vocabulary, start)
    with feed as batches:
        for batch in islice(batches, stop - start):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return state, losses


def _generate(setup: Setup, state: TrainState) -> list[int]:
    sampling = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS)
    steps = generate(
        setup.model, state.params, [[1, 2, 3]], sampling, eos_id=None, key=jax.random.key(0)
    )
    return [token for (token,) in steps if token is not None]
