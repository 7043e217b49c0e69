"""Metrics of training steps, and the log they are written to.

A metrics record is a flat dict of JSON numbers with an integer ``step``; the step is the number of
updates made so far.
"""

import resource
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.train.records import RecordSink
from maxlm.train.reporting import ReportingConfig, Sink, open_sinks


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, summed in fp32; a scalar. 0 of an empty tree."""
    leaves = jax.tree.leaves(tree)
    squares = [jnp.sum(jnp.square(jnp.abs(x.astype(jnp.float32)))) for x in leaves]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def divide_by_tokens(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A task's sums as they are logged: divided by ``tokens``; of experts, the busiest's and
    the idlest's load over the mean, and the share of assignments dropped."""
    tokens = jnp.maximum(sums["tokens"], 1.0)
    own = {k: v for k, v in sums.items() if k not in ("tokens", "expert_load")}
    loads = jnp.maximum(sums.get("expert_load", tokens), 1.0)
    return {k: v / (loads if k.startswith("expert_") else tokens) for k, v in own.items()}


def measure_memory() -> dict[str, float]:
    """Peak memory in bytes: ``device_memory_peak`` of the first local device where the backend
    counts it (GPU, TPU), else ``process_memory_peak`` (resident set, JAX's and Python's)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"device_memory_peak": stats["peak_bytes_in_use"]}
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return {"process_memory_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class MetricsLog:
    """``metrics.jsonl`` and ``events.jsonl`` in a run folder, and what shows them elsewhere.

    Resuming at a step drops every record after it, so that a run that was killed leaves the same
    ``metrics.jsonl`` as one that was not, but for times, rates and memory. ``events.jsonl`` only
    grows: `maxlm.programs.goodput` tells from it where the time of all attempts went.

    Args:
        folder: the run folder; made if missing.
        resume_step: keep records up to and including this step; 0 begins anew.
        write: False on all processes but the first: every method then does nothing.

    Raises MaxlmError where a file cannot be written, here and in every method.
    """

    def __init__(
        self,
        folder: str | Path,
        resume_step: int = 0,
        *,
        write: bool = True,
        reporting: ReportingConfig = ReportingConfig(),
    ):
        self.stopped = False
        """Whether the attempt's end was written down."""
        self.damaged_lines = 0
        """How many lines of ``metrics.jsonl`` hold no record."""
        self._sinks: list[Sink] = []
        with ExitStack() as stack:
            if write:
                records = RecordSink(Path(folder), resume_step)
                self.damaged_lines = records.damaged_lines
                for sink in chain([records], open_sinks(reporting, Path(folder), resume_step)):
                    stack.callback(sink.close)
                    self._sinks.append(sink)
            self._open = stack.pop_all()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record: ``step`` and finite or non-finite numbers (written as null)."""
        numbers = {name: v if isinstance(v, int) else float(v) for name, v in values.items()}
        for sink in self._sinks:
            sink.log(step, numbers)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Appends an event with the wall time in seconds; docs/runs.md lists them."""
        self.stopped = kind == "stop"
        for sink in self._sinks:
            sink.event(kind, step, details)

    def rewind(self, step: int) -> None:
        """Drops the records after ``step``: training goes on from there once more."""
        for sink in self._sinks:
            sink.rewind(step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
