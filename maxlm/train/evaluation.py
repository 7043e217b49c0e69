"""The records of a run: each step's scalars, how well it predicts held-out text, in
units that do not depend on its tokenizer, and its scores on tasks."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchSource
from maxlm.evaluation.curves import compute_gold_probability, compute_position_losses
from maxlm.evaluation.program import import_harness
from maxlm.evaluation.results import list_metrics
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.scoring import Scorer
from maxlm.models.architectures import Encoder
from maxlm.optim.state import TrainState
from maxlm.plan.predict import RunPlan
from maxlm.run.prepare import PreparedData
from maxlm.run.setup import RunSetup, open_evaluation_batches
from maxlm.train.display import ConsoleDisplay
from maxlm.train.records import MetricsLog
from maxlm.train.trainer import Callback, Trainer, measure_peak_memory_bytes

HeldOutResults = dict[str, dict[str, float]]
"""Results by source: ``loss`` (nats per predicted token, or the task's own),
``tokens``, the task's other sums per token and, where every token is predicted,
``bits_per_byte`` and ``bytes``."""
_RATES = ("loss", "cross_entropy", "bits_per_byte", "bytes", "tokens")


@dataclass(frozen=True)
class HeldOutEvaluation:
    """Results on held-out text at the end of a run."""

    curve_point: HeldOutResults
    """On the first ``train.eval_batches`` batches of each source: the rows that every
    other point of the run's curve is measured on."""
    whole: HeldOutResults
    """On all of each source's text."""


class HeldOutEvaluator:
    """Evaluates on a run's held-out text.

    Documents are cut into sequences, each predicted without what came before. Every
    token but a document's first is predicted, its end-of-text token among them; the
    bits of all are divided by the bytes of text. Of a part of the text, bytes are
    estimated from the store's own ratio of bytes to tokens. ``on_batch`` is called
    before each batch.
    """

    def __init__(
        self, setup: RunSetup, data: PreparedData, on_batch: Callable[[], None]
    ):
        self._setup, self._data, self._on_batch = setup, data, on_batch
        self._eval_fn = setup.jit_eval_step()

    def evaluate(self, state: TrainState) -> HeldOutEvaluation:
        """Evaluates on all of each source's text, and on the part that curves are made
        of."""
        curve_point: HeldOutResults = {}
        whole: HeldOutResults = {}
        for name, source in self._data.eval_batch_sources.items():
            part_sums, all_sums = self._add_up(state, source, None)
            curve_point[name] = self._make_result(name, part_sums)
            whole[name] = self._make_result(name, all_sums)
        return HeldOutEvaluation(curve_point, whole)

    def evaluate_metrics(self, state: TrainState) -> dict[str, float]:
        """Evaluates on ``train.eval_batches`` batches; returns a metrics record."""
        count = self._setup.config.train.eval_batches
        results: HeldOutResults = {}
        for name, source in self._data.eval_batch_sources.items():
            sums, _ = self._add_up(state, source, count)
            results[name] = self._make_result(name, sums)
        return self._make_metrics_record(int(state.step), results)

    def make_final_record(
        self, step: int, evaluation: HeldOutEvaluation
    ) -> dict[str, float]:
        """Returns the metrics record of the end: ``eval_...`` continues the curve, on
        its rows, and ``final_eval_...`` is on all held-out text."""
        record = self._make_metrics_record(step, evaluation.curve_point)
        final = self._make_metrics_record(step, evaluation.whole)
        return record | {
            f"final_{n}": x for n, x in final.items() if n.startswith("eval_")
        }

    def _add_up(
        self, state: TrainState, source: BatchSource, max_batches: int | None
    ) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Returns the sums over the first ``train.eval_batches`` batches, and over all
        that were read: at most ``max_batches``."""
        params = get_eval_params(state)
        curve_batches = self._setup.config.train.eval_batches
        sums = defaultdict[str, float](float)
        part_sums: Mapping[str, float] | None = None
        with open_evaluation_batches(self._setup, source, max_batches) as batches:
            for number, batch in enumerate(batches, 1):
                self._on_batch()
                values = jax.device_get(self._eval_fn(params, state.frozen, batch))
                for metric, value in values.items():  # added up in float64
                    sums[metric] += float(value)
                if number == curve_batches:
                    part_sums = dict(sums)
        return (sums if part_sums is None else part_sums), sums

    def _make_result(self, source: str, sums: Mapping[str, float]) -> dict[str, float]:
        loss = sums.get("cross_entropy", sums["loss"]) / sums["tokens"]
        result = {name: value / sums["tokens"] for name, value in sums.items()}
        result |= {"loss": loss, "tokens": sums["tokens"]}
        if self._setup.config.task.predicts_every_token:
            store = self._data.heldout_stores[source]
            predictable = store.num_tokens - store.num_documents
            text_bytes = store.manifest.text_bytes * sums["tokens"] / predictable
            bits = sums["cross_entropy"] / math.log(2)
            result |= {"bits_per_byte": bits / text_bytes, "bytes": text_bytes}
        return result

    def _make_metrics_record(
        self, step: int, results: HeldOutResults
    ) -> dict[str, float]:
        """Returns a metrics record: ``eval_loss`` and what else the task measures are
        over the tokens of all sources, rates are each source's own."""
        data = self._setup.config.data
        by_source = [*results.values()]
        counted = sum(result["tokens"] for result in by_source)
        names = {name for name in by_source[0] if not name.startswith("expert_")}
        record: dict[str, float] = {"tokens": step * data.batch_size * data.seq_len}
        for name in ("loss", *sorted(names - {*_RATES})):
            total = sum(result[name] * result["tokens"] for result in by_source)
            record[f"eval_{name}"] = total / counted
        for source, result in results.items():
            if "bits_per_byte" in result:
                record[f"eval_bits_per_byte/{source}"] = result["bits_per_byte"]
        return record


class DownstreamEvaluator:
    """Evaluates a run's model on ``train.downstream``'s tasks, on the mesh that it
    trains on. Raises MaxlmError: a task that does not exist, rows that are not there, a
    model or mesh that cannot continue text; before training begins. ``on_work``: called
    before each task, and with each request that is done."""

    def __init__(
        self, setup: RunSetup, data: PreparedData, on_work: Callable[[], None]
    ):
        self._setup, self._data, self._on_work = setup, data, on_work
        self._config = config = setup.config.train.downstream
        if not config.tasks and not config.position_documents:
            return
        if isinstance(setup.model, Encoder) or setup.mesh.shape["context"] > 1:
            what = "tasks need a model that continues text, on a mesh with context=1"
            raise MaxlmError(what, where="train.downstream", fix="set its tasks to []")
        if config.tasks:
            self._models, self._harness = import_harness()
            folder = None if config.data is None else Path(config.data)
            self._tasks = self._harness.load_tasks(
                config.tasks, data=folder, shots=config.shots
            )
        self._model, self._shardings = setup.place_to_generate()

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Returns a metrics record; {} where nothing is asked for."""
        config, length = self._config, self._setup.config.data.seq_len
        if not config.tasks and not config.position_documents:
            return {}
        params = jax.device_put(get_eval_params(state), self._shardings)
        sizes: Any = {"max_sequences": 32, "max_chunks": 32, "max_length": length}
        engine = Engine(
            self._model, params, EngineConfig(**sizes), self._data.tokenizer
        )
        del params
        tokens = int(state.step) * self._setup.config.data.batch_size * length
        record: dict[str, float] = {"tokens": tokens}
        if config.position_documents:
            losses = compute_position_losses(Scorer(engine), self._select_documents())
            record |= {f"eval_loss_at/{end}": loss for end, loss in losses.items()}
        return record | (self._evaluate_tasks(engine) if config.tasks else {})

    def _evaluate_tasks(self, engine: Engine) -> dict[str, float]:
        record: dict[str, float] = {}
        model = self._models.MaxlmModel(engine)
        model.on_progress = lambda done, total: self._on_work()
        results = self._harness.evaluate_tasks(
            model, self._tasks, limit=self._config.limit
        )
        for task, metric, value, *_ in list_metrics(results):
            record[f"downstream/{task}/{metric}"] = value
        for task, samples in results["samples"].items():
            probability = compute_gold_probability(samples)
            if probability is not None:
                record[f"downstream/{task}/gold_probability"] = probability
        return record

    def _select_documents(self) -> list[list[int]]:
        """The beginnings of the first held-out documents that are long enough."""
        length, wanted = (
            self._setup.config.data.seq_len,
            self._config.position_documents,
        )
        documents = (
            store.text_tokens(index)
            for store in self._data.heldout_stores.values()
            for index in range(store.num_documents)
        )
        found = islice((each for each in documents if len(each) >= length), wanted)
        rows = [each[:length].tolist() for each in found]
        if not rows:
            what = f"no held-out document has {length} tokens (data.seq_len)"
            raise MaxlmError(
                what, where="train.downstream.position_documents", fix="set it to 0"
            )
        return rows


def format_downstream(metrics: Mapping[str, float]) -> str:
    """Returns the metrics of tasks in a line, and the loss with the longest context."""
    parts = ((name.split("/"), value) for name, value in metrics.items())
    words = [
        f"{own[1]} {own[2]} {value:.3f}"
        for own, value in parts
        if own[0] == "downstream"
    ]
    if ends := [
        int(n.partition("/")[2]) for n in metrics if n.startswith("eval_loss_at/")
    ]:
        words.append(
            f"loss at {max(ends):,} tokens {metrics[f'eval_loss_at/{max(ends)}']:.3f}"
        )
    return " · ".join(words)


def get_eval_params(state: TrainState) -> Any:
    """Returns the parameters to use a model with: their moving average where there is
    one."""
    return state.params if state.ema is None else state.ema


class MetricsCallback(Callback):
    """Adds rates to a step's scalars, writes them and shows them.

    ``mfu`` counts causal attention at half, ``mfu_full_attention`` in full. On a CPU
    the peak is what a large matmul reached when the run started. The plan's predictions
    stand beside what is measured: ``planned_seconds``, ``planned_mfu``,
    ``planned_memory``.
    """

    def __init__(
        self,
        setup: RunSetup,
        data: PreparedData,
        plan: RunPlan,
        log: MetricsLog,
        display: ConsoleDisplay,
    ):
        self._config = setup.config
        self._plan = plan
        self._log = log
        self._display = display
        self._planned: dict[str, Any] = {}
        if plan.step_seconds is not None:
            self._planned = {
                "planned_seconds": plan.step_seconds,
                "planned_mfu": plan.mfu(),
                "planned_memory": float(plan.memory.total),
            }
        self._mixture: Any = getattr(data.train_batch_source, "mixture", None)
        self._bytes_per_target = {
            name: store.manifest.text_bytes / (store.num_tokens - store.num_documents)
            for name, store in data.train_stores.items()
        }

    def on_step_end(
        self, trainer: Trainer, step: int, metrics: dict[str, float]
    ) -> None:
        data, layout = self._config.data, self._plan.layout
        peak = self._plan.total_peak_flops_per_second
        tokens_per_step = data.batch_size * data.seq_len
        rate = tokens_per_step / metrics["seconds"]
        record = metrics | {"tokens": step * tokens_per_step, "tokens_per_second": rate}
        record |= measure_peak_memory_bytes() | self._planned
        if self._config.task.predicts_every_token:
            shares = self._mixture.shares(max(0, step - 1) * data.batch_size)
            record["bits_per_byte"] = (metrics["cross_entropy"] / math.log(2)) / sum(
                share * self._bytes_per_target[name] for name, share in shares.items()
            )
        if peak is not None:
            record["mfu"] = rate * layout.flops_per_token / peak
            record["mfu_full_attention"] = (
                rate * layout.flops_per_token_full_attention / peak
            )
        self._display.update(step, record)
        self._log.log(step, record)

    def on_evaluation_end(
        self, trainer: Trainer, step: int, metrics: dict[str, float]
    ) -> None:
        parts = ((name.partition("/"), rate) for name, rate in metrics.items())
        rates = [
            (own[2], rate) for own, rate in parts if own[0] == "eval_bits_per_byte"
        ]
        words = [f"{name} {rate:.3f} bits per byte" for name, rate in rates]
        if "eval_loss" in metrics:
            words = [f"held out: loss {metrics['eval_loss']:.4f}", *words]
            if "eval_accuracy" in metrics:
                words.append(f"accuracy {metrics['eval_accuracy']:.1%}")
        else:
            words = [format_downstream(metrics)]
        self._display.message(" · ".join([f"step {step}", *words]))
        self._log.log(step, metrics)
