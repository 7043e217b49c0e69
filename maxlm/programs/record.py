"""A step's scalars, as they are written down and shown."""

from collections.abc import Mapping
from math import log
from typing import Any

from maxlm.plan.predict import RunPlan
from maxlm.programs.prepare import PreparedText
from maxlm.programs.setup import Setup
from maxlm.train.display import ConsoleDisplay
from maxlm.train.records import MetricsLog
from maxlm.train.trainer import Callback, Trainer, measure_memory


class MetricsCallback(Callback):
    """Adds rates to a step's scalars, writes them and shows them.

    ``mfu`` counts causal attention at half, ``mfu_full_attention`` in full. On a CPU the peak is
    what a large matmul reached when the run started. The plan's predictions stand beside what is
    measured: ``planned_seconds``, ``planned_mfu``, ``planned_memory``.
    """

    def __init__(
        self,
        setup: Setup,
        corpus: PreparedText,
        plan: RunPlan,
        log_to: MetricsLog,
        display: ConsoleDisplay,
    ):
        self._config, self._plan = setup.config, plan
        self._log, self._display = log_to, display
        self._planned = {}
        if plan.step_seconds is not None:
            self._planned = {
                "planned_seconds": plan.step_seconds,
                "planned_mfu": plan.mfu(),
                "planned_memory": float(plan.memory.total),
            }
        self._mixture: Any = getattr(corpus.batches, "mixture", None)
        self._bytes_per_target = {
            name: store.manifest.text_bytes / (store.num_tokens - store.num_documents)
            for name, store in corpus.training.items()
        }

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        data, layout, peak = self._config.data, self._plan.layout, self._plan.peak_flops
        tokens_per_step = data.batch_size * data.seq_len
        rate = tokens_per_step / metrics["seconds"]
        record = {
            **metrics,
            "tokens": step * tokens_per_step,
            "tokens_per_second": rate,
            **measure_memory(),
            **self._planned,
        }
        if self._config.task.predicts_every_token:
            shares = self._mixture.shares(max(0, step - 1) * data.batch_size)
            record["bits_per_byte"] = (metrics["cross_entropy"] / log(2)) / sum(
                share * self._bytes_per_target[name] for name, share in shares.items()
            )
        if peak is not None:
            record["mfu"] = rate * layout.flops_per_token / peak
            record["mfu_full_attention"] = rate * layout.flops_per_token_full_attention / peak
        self._display.update(step, record)
        self._log.log(step, record)

    def on_evaluation_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        self._display.message(_summarize_evaluation(step, metrics))
        self._log.log(step, metrics)


def _summarize_evaluation(step: int, metrics: Mapping[str, float]) -> str:
    """``step 140 · held out: loss 4.8662 · text 1.923 bits per byte``"""
    prefix = "eval_bits_per_byte/"
    rates = {n.removeprefix(prefix): v for n, v in metrics.items() if n.startswith(prefix)}
    parts = [f"{name} {rate:.3f} bits per byte" for name, rate in rates.items()]
    return " · ".join([f"step {step}", f"held out: loss {metrics['eval_loss']:.4f}", *parts])
