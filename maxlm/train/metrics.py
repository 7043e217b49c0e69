"""What a run reports: numbers about arrays, and the files they go to.

A metrics record is a flat dict of JSON numbers with an integer ``step``; the step is the number of
updates made so far.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config import MaxlmError

Record = Mapping[str, Any]


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, summed in fp32; a scalar. 0 of an empty tree."""
    leaves = jax.tree.leaves(tree)
    squares = [jnp.sum(jnp.square(jnp.abs(x.astype(jnp.float32)))) for x in leaves]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def per_token(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """An objective's sums as they are logged: divided by ``tokens``; of experts, the busiest's and
    the idlest's load over the mean, and the share of assignments dropped."""
    tokens = jnp.maximum(sums["tokens"], 1.0)
    own = {k: v for k, v in sums.items() if k not in ("tokens", "expert_load")}
    loads = jnp.maximum(sums.get("expert_load", tokens), 1.0)
    return {k: v / (loads if k.startswith("expert_") else tokens) for k, v in own.items()}


def tree_norms(grads: Any, params: Any, updates: Any) -> dict[str, jax.Array]:
    """fp32 scalars: ``grad_norm`` (before clipping), ``param_norm`` and ``update_norm``."""
    return {
        "grad_norm": global_norm(grads),
        "param_norm": global_norm(params),
        "update_norm": global_norm(updates),
    }


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation (PaLM, appendix B): the share of peak spent on the model's own work.

    Args:
        flops_per_token: of forward and backward passes, without rematerialisation. Which
            convention (causal attention counted in full, or halved) is the caller's choice.
        peak_flops: FLOP/s of all devices together, in the dtype of the matrix products.
    """
    return tokens_per_second * flops_per_token / peak_flops


def memory_record() -> dict[str, float]:
    """Peak memory in bytes: of the first local device, or else of this process.

    ``device_memory_peak`` where the backend counts it (GPU, TPU), ``process_memory_peak``
    (resident set, JAX's and Python's together) on CPU. Never both: they are not comparable.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"device_memory_peak": stats["peak_bytes_in_use"]}
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return {"process_memory_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file; a last line cut short by a kill is left out."""
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


class MetricsLog:
    """``metrics.jsonl`` and ``events.jsonl`` in a run folder, and TensorBoard events beside them.

    Resuming at a step drops every record after it, so that a run that was killed leaves the same
    ``metrics.jsonl`` as one that was not, but for times, rates and memory. ``events.jsonl`` only
    grows: from its starts, resumes, checkpoints begun and stops, with wall times, goodput can be
    computed.

    Args:
        folder: the run folder; made if missing.
        resume_step: keep records up to and including this step; 0 begins anew.
        write: False on all processes but the first: every method then does nothing.
        tensorboard: also write TensorBoard events.

    Raises:
        MaxlmError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        resume_step: int = 0,
        *,
        write: bool = True,
        tensorboard: bool = True,
    ):
        self._write = write
        self._board = None
        if not write:
            return
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = self._resume(folder / "metrics.jsonl", resume_step)
            self._events = (folder / "events.jsonl").open("a")
        except OSError as error:
            raise MaxlmError(
                f"cannot write metrics ({error.strerror})",
                where=str(folder),
                fix="name a folder that can be written",
            ) from error
        if tensorboard:
            from tensorboardX import SummaryWriter

            purge = resume_step + 1 if resume_step else None
            # Its file names go by the second: a quick restart would overwrite the last run's.
            suffix = f".{resume_step}.{os.getpid()}"
            board = str(folder / "tensorboard")
            self._board = SummaryWriter(board, purge_step=purge, filename_suffix=suffix)

    @staticmethod
    def _resume(path: Path, step: int):
        kept = [r for r in read_records(path) if r["step"] <= step] if step else []
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("w") as file:
            file.writelines(f"{json.dumps(r)}\n" for r in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return path.open("a")

    def log(self, step: int, values: Record) -> None:
        """Append one record: ``step`` and finite or non-finite numbers (written as null)."""
        if not self._write:
            return
        record = {"step": step} | {name: _number(value) for name, value in values.items()}
        self._metrics.write(f"{json.dumps(record)}\n")
        self._metrics.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), step)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Append an event (start, resume, checkpoint, stop, ...) with the wall time in seconds."""
        if not self._write:
            return
        record = {"event": kind, "step": step, "time": time.time(), **details}
        self._events.write(f"{json.dumps(record)}\n")
        self._events.flush()

    def close(self) -> None:
        """Write everything out."""
        if self._write:
            self._metrics.close()
            self._events.close()
            if self._board:
                self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _number(value: Any) -> int | float | None:
    value = value if isinstance(value, int) else float(value)
    return value if abs(value) < float("inf") else None  # also None for NaN: JSON has neither
