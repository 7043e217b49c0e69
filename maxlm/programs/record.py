"""What the loop's raw scalars become before they are written down."""

from collections.abc import Callable, Mapping
from math import log
from typing import Any

from maxlm.plan.predict import RunPlan
from maxlm.programs.prepare import Corpus
from maxlm.programs.setup import Setup
from maxlm.train.display import ConsoleDisplay
from maxlm.train.metrics import MetricsLog, memory_record, mfu


def _evaluated(step: int, values: Mapping[str, float]) -> str:
    """``step 140 · held out: loss 4.8662 · text 1.923 bits per byte``"""
    prefix = "eval_bits_per_byte/"
    rates = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
    parts = [f"{name} {rate:.3f} bits per byte" for name, rate in rates.items()]
    return " · ".join([f"step {step}", f"held out: loss {values['eval_loss']:.4f}", *parts])


def recorder(
    setup: Setup, corpus: Corpus, plan: RunPlan, log_to: MetricsLog, display: ConsoleDisplay
) -> Callable[[int, Mapping[str, float]], None]:
    """A hook that adds rates to a step's scalars, writes them and shows them.

    ``mfu`` counts causal attention at half, ``mfu_full_attention`` in full. On a CPU the peak is
    what a large matmul reached when the run started. What the plan predicted stands beside what is
    measured: ``planned_seconds``, ``planned_mfu``, ``planned_memory``.
    """
    config = setup.config
    tokens_a_step = config.data.batch_size * config.data.seq_len
    layout = plan.layout
    peak, planned = plan.peak_flops, {}
    if plan.step_seconds is not None:
        planned = {
            "planned_seconds": plan.step_seconds,
            "planned_mfu": plan.mfu(),
            "planned_memory": float(plan.memory.total),
        }
    bytes_a_target = {
        name: store.manifest.text_bytes / (store.num_tokens - store.num_documents)
        for name, store in corpus.training.items()
    }

    mixture: Any = getattr(corpus.batches, "mixture", None)

    def record(step: int, values: Mapping[str, float]) -> None:
        if "seconds" in values:
            rate = tokens_a_step / values["seconds"]
            values = {
                **values,
                "tokens": step * tokens_a_step,
                "tokens_per_second": rate,
                **memory_record(),
                **planned,
            }
            if config.task.predicts_every_token:
                bits = values["cross_entropy"] / log(2)
                shares = mixture.shares(max(0, step - 1) * config.data.batch_size)
                values["bits_per_byte"] = bits / sum(
                    share * bytes_a_target[name] for name, share in shares.items()
                )
            if peak is not None:
                values["mfu"] = mfu(rate, layout.flops_per_token, peak)
                values["mfu_full_attention"] = mfu(
                    rate, layout.flops_per_token_full_attention, peak
                )
            display.update(step, values)
        else:
            display.message(_evaluated(step, values))
        log_to.log(step, values)

    return record
