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
    parts = []
    context_lengths = []
    for name, value in metrics.items():
        group, _, rest = name.partition("/")
        if group == "downstream":
            task, metric = rest.split("/")[:2]
            parts.append(f"{task} {metric} {value:.3f}")
        elif group == "eval_loss_at":
            context_lengths.append(int(rest))
    if context_lengths:
        longest = max(context_lengths)
        loss = metrics[f"eval_loss_at/{longest}"]
        parts.append(f"loss at {longest:,} tokens {loss:.3f}")
    return " · ".join(parts)


def format_validation(metrics: Mapping[str, float]) -> str:
    """Returns the metrics of a policy's validation in a line."""
    parts = [f"validation: reward {metrics['eval_reward']:.4f}"]
    for name, value in metrics.items():
        if name.startswith("eval_reward/"):
            parts.append(f"{name.removeprefix('eval_reward/')} {value:.4f}")
        elif name.startswith("eval_best_of_"):
            parts.append(f"best of {name.removeprefix('eval_best_of_')} {value:.4f}")
    parts.append(f"length {metrics['eval_response_length']:.1f}")
    parts.append(f"complete {metrics['eval_complete']:.1%}")
    return " · ".join(parts)


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
        self._planned: dict[str, float | None] = {}
        if plan.step_seconds is not None:
            self._planned = {
                "planned_seconds": plan.step_seconds,
                "planned_mfu": plan.mfu(),
                "planned_memory": plan.peak_bytes,
            }
        self._mixture: Any = getattr(data.train_batch_source, "mixture", None)
        self._bytes_per_target = {
            name: store.manifest.text_bytes / (store.num_tokens - store.num_documents)
            for name, store in data.train_stores.items()
        }

    def on_step_end(
        self, trainer: Trainer, step: int, metrics: dict[str, float]
    ) -> None:
        data = self._config.data
        tokens_per_step = data.batch_size * data.seq_len
        tokens_per_second = tokens_per_step / metrics["seconds"]
        record = {
            **metrics,
            "tokens": step * tokens_per_step,
            "tokens_per_second": tokens_per_second,
            **measure_peak_memory_bytes(),
            **self._planned,
        }
        if self._config.task.predicts_every_token:
            # The mixture that the step's batch was drawn from.
            first_row = max(0, step - 1) * data.batch_size
            shares = self._mixture.shares(first_row)
            bits_per_target = metrics["cross_entropy"] / math.log(2)
            bytes_per_target = sum(
                share * self._bytes_per_target[name] for name, share in shares.items()
            )
            record["bits_per_byte"] = bits_per_target / bytes_per_target
        peak_flops = self._plan.total_peak_flops_per_second
        if peak_flops is not None:
            flops = self._plan.layout.flops_per_token
            full_flops = self._plan.layout.flops_per_token_full_attention
            record["mfu"] = tokens_per_second * flops / peak_flops
            record["mfu_full_attention"] = tokens_per_second * full_flops / peak_flops
        self._display.update(step, record)
        self._log.log(step, record)

    def on_evaluation_end(
        self, trainer: Trainer, step: int, metrics: dict[str, float]
    ) -> None:
        parts = [f"step {step}"]
        if "eval_loss" in metrics:
            parts.append(f"held out: loss {metrics['eval_loss']:.4f}")
            for name, value in metrics.items():
                group, _, source = name.partition("/")
                if group == "eval_bits_per_byte":
                    parts.append(f"{source} {value:.3f} bits per byte")
            if "eval_accuracy" in metrics:
                parts.append(f"accuracy {metrics['eval_accuracy']:.1%}")
        elif "eval_reward" in metrics:
            parts.append(format_validation(metrics))
        else:
            parts.append(format_downstream(metrics))
        self._display.message(" · ".join(parts))
        self._log.log(step, metrics)
