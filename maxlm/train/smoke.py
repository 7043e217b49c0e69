"""Does a config work? The whole life of a model in a minute, on whatever device is
here."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import layer_group_shapes
from maxlm.config.sampling import SamplingConfig
from maxlm.data.batch_source import BatchSource
from maxlm.data.documents.files import find_files
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.inference.generate import collect_tokens, generate
from maxlm.models.params import flatten_names
from maxlm.optim.state import TrainState
from maxlm.optim.step import Metrics
from maxlm.plan.layout import compute_run_layout
from maxlm.run.config import RunConfig
from maxlm.run.prepare import make_source_inputs, read_vocab_size
from maxlm.run.rollout_source import RolloutContext, open_step_batches
from maxlm.run.setup import RunSetup, set_up_run, use_compilation_cache
from maxlm.run.warm_start import load_frozen_models
from maxlm.sharding import count_min_devices, mesh_sizes
from maxlm.tasks import Vocabulary
from maxlm.tasks.rows import RowTask
from maxlm.tasks.task import DeviceBatch, WatchedMetric

NUM_STEPS = 10
# Where few tokens are targets, it takes more of them to learn as much.
NUM_SPARSE_STEPS = 30
SAVED_STEP = 5
NUM_NEW_TOKENS = 8
# The least share by which the watched metric must change: more than chance, far less
# than what a model learns.
MIN_CHANGE = 0.1
# Sizes of the small model.
VOCAB_SIZE = 512
SEQ_LEN = 64
NUM_LAYERS = 2
HEAD_DIM = 16
# Ids that its text is made of.
NUM_USED_IDS = 32


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
    tells_by_few = task.predicts_every_token or task.watched_metric is None
    steps = NUM_STEPS if tells_by_few else NUM_SPARSE_STEPS
    # Each kind of layers once, behind a dense one if there are such.
    num_kinds = len(dict.fromkeys(config.model.pattern))
    num_kinds += min(config.model.dense_layers, 1)
    small_model = config.model.shrunk(
        vocab_size=VOCAB_SIZE,
        num_layers=max(NUM_LAYERS, num_kinds),
        head_dim=HEAD_DIM,
        seq_len=max(task.row_lengths(SEQ_LEN)),
    )
    micro_batches = min(config.train.micro_batches, 2)
    batch_size = 4 * micro_batches * num_devices
    data = config.data.model_copy(
        update={"seq_len": SEQ_LEN, "batch_size": batch_size, "workers": 0}
    )
    train = config.train.model_copy(
        update={"steps": steps, "micro_batches": micro_batches, "max_device_rows": None}
    )
    # At which a tiny model trains stably, with an effect within ten steps.
    learning_rate = 1e-3 if config.optimizer.kind == "lion" else 1e-2
    schedule = config.schedule.model_copy(
        update={"kind": "constant", "warmup_steps": 0, "learning_rate": learning_rate}
    )
    settings = dict(config) | {
        "tune": {},  # the model has its scaling
        "model": small_model,
        "task": task,
        "mesh": {"data": 1, "fsdp": num_devices},
        "samples": {},
        "data": data,
        "train": train,
        "schedule": schedule,
    }
    return RunConfig.model_validate(settings)


class CountingTokenSource:
    """A token source that is quickly learnt: documents that count up and around, in few
    tokens."""

    path = None
    offsets_sha256 = ""

    def __init__(self, vocab_size: int):
        num_used = min(vocab_size, NUM_USED_IDS)
        special = np.arange(vocab_size) >= num_used
        eos_id = min(num_used, vocab_size - 1)
        self.vocabulary = Vocabulary(vocab_size, (), eos_id, special, ~special)
        # Of each of 512 documents: its length, 20 to 99; the id it begins with; and
        # what it counts by, 1 to 3.
        lows = (20, 0, 1)
        highs = (100, num_used, 4)
        random = np.random.default_rng(0)
        draws = random.integers(lows, highs, (512, 3)).tolist()
        texts = []
        for length, start, stride in draws:
            texts.append((start + stride * np.arange(length)) % num_used)
        lengths = [len(text) for text in texts]
        self.offsets = np.cumsum([0, *lengths])
        self._tokens = np.concatenate(texts).astype(np.uint32)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def read_many(
        self, starts: Sequence[int], stops: Sequence[int]
    ) -> list[np.ndarray]:
        return [
            self._tokens[start:stop] for start, stop in zip(starts, stops, strict=True)
        ]


def train_digits_tokenizer() -> Tokenizer:
    """Makes a tokenizer for tasks of rows, whose text is digits
    (:func:`write_counting_rows`), and of policies, who answer sums."""
    digits = [b"0 1 2 3 4 5 6 7 8 9 " * 20]
    return train_tokenizer(TokenizerConfig(vocab_size=257), digits)


def make_counting_batch_source(config: RunConfig, tokenizer: Tokenizer) -> BatchSource:
    """Makes a task's batches of :class:`CountingTokenSource`."""
    text = CountingTokenSource(config.model.vocab_size)
    inputs = make_source_inputs(
        config, tokenizer, {"text": text}, vocabulary=text.vocabulary
    )
    return config.task.batch_source(replace(inputs, mixing={"text": 1.0}))


def write_counting_rows(path: Path) -> None:
    """Writes rows of every form that a task reads: numbers to count on from, rightly or
    not."""
    with path.open("w", encoding="utf-8") as file:
        for index in range(256):
            digits = [str((index + offset) % 10) for offset in range(10)]
            right = " " + " ".join(digits[4:])
            wrong = " " + " ".join([digits[0]] * 6)  # it does not count on
            is_right = index % 2 == 0
            row = {
                "prompt": " ".join(digits[:4]),
                "chosen": right,
                "rejected": wrong,
                "label": is_right,
                "completion": right if is_right else wrong,
            }
            file.write(json.dumps(row) + "\n")


def smoke(config: RunConfig, devices: Sequence[Any] | None = None) -> Iterator[Check]:
    """Shrink a run to these devices (default: all) and try it, yielding each check as
    it is made.

    Before the first check the run itself is looked at, in its own size, without
    devices: whatever a mesh, a schedule, a batch, a tokenizer's size or missing
    documents make impossible raises a MaxlmError.
    """
    _check_full_size(config)
    use_compilation_cache(config)
    devices = jax.devices() if devices is None else devices
    small = shrink_config(config, len(devices))
    # Models that the task reads begin as the trained one, and are as small.
    frozen_sources = dict.fromkeys(small.task.frozen_models())
    setup = set_up_run(small, devices, frozen_sources=frozen_sources)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(small.task, RowTask):
            rows = Path(folder, "rows.jsonl")
            write_counting_rows(rows)
            task = small.task.model_copy(update={"files": (str(rows),)})
            setup = replace(setup, config=small.model_copy(update={"task": task}))
        yield from _make_checks(setup, Path(folder))


def _check_full_size(config: RunConfig) -> None:
    """Raises MaxlmError for a run that cannot be, whatever the devices."""
    num_devices = count_min_devices(config.mesh)
    compute_run_layout(config, mesh_sizes(config.mesh, num_devices))
    config.task.check_vocab_size(read_vocab_size(config), config.model.vocab_size)
    for source in config.data.sources:
        if source.documents:
            find_files(source)


def _make_checks(setup: RunSetup, folder: Path) -> Iterator[Check]:
    state = setup.init_train_state()
    state = replace(state, frozen=load_frozen_models(setup, RunSetup.init_train_state))
    num_params = sum(spec.size for spec in flatten_names(setup.specs).values())
    matches = jax.tree.map(
        lambda array, sharding: array.sharding == sharding, state, setup.shardings
    )
    detail = f"{num_params:,} on {setup.mesh.size} device(s)"
    yield Check("parameters lie as planned", jax.tree.all(matches), detail)

    # Up to the step that is saved.
    train_step = setup.jit_train_step()
    last_step = setup.config.train.steps
    began = time.perf_counter()
    state, first_metrics = _train(setup, train_step, state, SAVED_STEP, folder)
    # A copy on the host: the next step takes the state's memory.
    saved = jax.tree.map(np.asarray, state)
    seconds = time.perf_counter() - began
    detail = f"{SAVED_STEP} steps in {seconds:.1f} s, compilation included"
    all_ran = len(first_metrics) == SAVED_STEP
    yield Check("the step compiles and runs", all_ran, detail)

    # The rest, while the checkpoint is written; then the same from the checkpoint.
    layer_groups = layer_group_shapes(setup.specs)
    checkpoint_folder = folder / "checkpoints"
    with FolderTier(checkpoint_folder, layer_groups=layer_groups) as checkpoints:
        checkpoints.save(SAVED_STEP, replace(state, frozen={}), {})
        state, last_metrics = _train(setup, train_step, state, last_step, folder)
        all_metrics = first_metrics + last_metrics
        losses = [metrics["loss"] for metrics in all_metrics]
        are_finite = all(math.isfinite(loss) for loss in losses)
        yield Check("losses are finite", are_finite, f"{losses[0]:.3f} at first")
        watched = setup.config.task.watched_metric
        if watched is not None:
            yield _check_learning(watched, all_metrics)
        checkpoints.wait()
        abstract_state = replace(setup.abstract_state, frozen={})
        restored = checkpoints.restore(SAVED_STEP, abstract_state)
    restored = replace(restored, frozen=state.frozen)
    are_equal = jax.tree.all(jax.tree.map(np.array_equal, saved, restored))
    yield Check("a checkpoint restores bit for bit", are_equal, f"step {SAVED_STEP}")
    _, repeated_metrics = _train(setup, train_step, restored, last_step, folder)
    detail = f"steps {SAVED_STEP + 1} to {last_step}"
    yield Check(
        "restored steps repeat exactly", repeated_metrics == last_metrics, detail
    )

    if setup.config.model.transformer_type == "encoder":
        return  # it names tokens, and continues nothing
    sampling = SamplingConfig(temperature=0, max_new_tokens=NUM_NEW_TOKENS)
    outputs = generate(setup.model, state.params, [[1, 2, 3]], sampling)
    (tokens,) = collect_tokens(outputs)
    is_whole = len(tokens) == NUM_NEW_TOKENS
    are_ids = max(tokens) < setup.config.model.vocab_size
    detail = " ".join(str(token) for token in tokens)
    yield Check("the model generates", is_whole and are_ids, detail)


def _check_learning(
    watched: WatchedMetric, all_metrics: Sequence[Mapping[str, float]]
) -> Check:
    """Checks that a metric of the steps goes where the task's does that learns."""
    values = [metrics[watched.name] for metrics in all_metrics]
    final_value = sum(values[-3:]) / 3
    change = (final_value - values[0]) / abs(values[0]) if values[0] else final_value
    passed = change > MIN_CHANGE if watched.goal == "rises" else change < -MIN_CHANGE
    name = f"the {watched.name} {watched.goal}"
    return Check(name, passed, f"{values[0]:.3f} → {values[-1]:.3f}")


def _train(
    setup: RunSetup,
    train_step: Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]],
    state: TrainState,
    last_step: int,
    folder: Path,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Trains up to ``last_step``; returns the state and the metrics of each step.
    Rollouts are kept in ``folder``, and read from there where they are made."""
    first_step = int(state.step)
    all_metrics = []
    tokenizer = train_digits_tokenizer()
    source = make_counting_batch_source(setup.config, tokenizer)
    context = RolloutContext(
        setup=setup,
        tokenizer=tokenizer,
        folder=folder,
        other_folder=None,
        start_step=first_step,
        skips=(),
        say=lambda line: None,
        on_work=lambda: None,
    )
    with open_step_batches(context, source) as batches:
        for _ in range(last_step - first_step):
            batches.roll_out(state)
            state, metrics = train_step(state, next(batches.arrays))
            all_metrics.append({name: float(x) for name, x in metrics.items()})
    return state, all_metrics
