"""How well a run predicts held-out text, in units that do not depend on its
tokenizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from maxlm.data.batch_source import BatchSource
from maxlm.optim.state import TrainState
from maxlm.optim.step import COUNT_PREFIX
from maxlm.run.prepare import PreparedData
from maxlm.run.setup import RunSetup, open_evaluation_batches

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
        self._setup = setup
        self._data = data
        self._on_batch = on_batch
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
        for name, value in final.items():
            if name.startswith("eval_"):
                record[f"final_{name}"] = value
        return record

    def _add_up(
        self, state: TrainState, source: BatchSource, max_batches: int | None
    ) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Returns the sums over the first ``train.eval_batches`` batches, and over all
        that were read: at most ``max_batches``."""
        curve_batches = self._setup.config.train.eval_batches
        sums = defaultdict[str, float](float)
        part_sums: Mapping[str, float] | None = None
        with open_evaluation_batches(self._setup, source, max_batches) as batches:
            for number, batch in enumerate(batches, 1):
                self._on_batch()
                values = jax.device_get(self._eval_fn(state, batch))
                for metric, value in values.items():  # added up in float64
                    sums[metric] += float(value)
                if number == curve_batches:
                    part_sums = dict(sums)
        if part_sums is None:  # all are fewer batches
            part_sums = sums
        return part_sums, sums

    def _make_result(self, source: str, sums: Mapping[str, float]) -> dict[str, float]:
        num_tokens = sums["tokens"]
        result: dict[str, float] = {}
        for name, value in sums.items():
            if not name.startswith(COUNT_PREFIX):
                count = sums.get(f"{COUNT_PREFIX}{name}", num_tokens)
                result[name] = value / count if count else 0.0
        # Nats per predicted token, or the task's own loss.
        result["loss"] = sums.get("cross_entropy", sums["loss"]) / num_tokens
        result["tokens"] = num_tokens
        if self._setup.config.task.predicts_every_token:
            store = self._data.heldout_stores[source]
            num_predictable = store.num_tokens - store.num_documents
            text_bytes = store.manifest.text_bytes * num_tokens / num_predictable
            bits = sums["cross_entropy"] / math.log(2)
            result["bits_per_byte"] = bits / text_bytes
            result["bytes"] = text_bytes
        return result

    def _make_metrics_record(
        self, step: int, results: HeldOutResults
    ) -> dict[str, float]:
        """Returns a metrics record: ``eval_loss`` and what else the task measures are
        over the tokens of all sources, rates are each source's own."""
        data = self._setup.config.data
        all_results = list(results.values())
        num_tokens = sum(result["tokens"] for result in all_results)
        names = {name for name in all_results[0] if not name.startswith("expert_")}
        record: dict[str, float] = {"tokens": step * data.batch_size * data.seq_len}
        for name in ("loss", *sorted(names - {*_RATES})):
            total = sum(result[name] * result["tokens"] for result in all_results)
            record[f"eval_{name}"] = total / num_tokens
        for source, result in results.items():
            if "bits_per_byte" in result:
                record[f"eval_bits_per_byte/{source}"] = result["bits_per_byte"]
        return record
