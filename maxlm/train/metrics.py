"""The records of a run: each step's scalars, as they are logged and shown."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from maxlm.run.prepare import PreparedData
from maxlm.run.setup import RunSetup
from maxlm.train.display import ConsoleDisplay
from maxlm.train.records import MetricsLog
from maxlm.train.trainer import Callback, Trainer, measure_peak_memory_bytes

if TYPE_CHECKING:
    from maxlm.plan.predict import RunPlan


def format_downstream(metrics: Mapping[str, float]) -> str:
    """Returns the metrics of tasks in a line, and the loss with the longest context."""
    parts = ((name.split("/"), value) for name, value in metrics.items())
    words = [
        f"{path[1]} {path[2]} {value:.3f}"
        for path, value in parts
        if path[0] == "downstream"
    ]
    if ends := [
        int(n.partition("/")[2]) for n in metrics if n.startswith("eval_loss_at/")
    ]:
        words.append(
            f"loss at {max(ends):,} tokens {metrics[f'eval_loss_at/{max(ends)}']:.3f}"
        )
    return " · ".join(words)


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
        plan: "RunPlan",
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
            (path[2], rate) for path, rate in parts if path[0] == "eval_bits_per_byte"
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
