"""Kinds of plans whose speeds are known to be wrong.

The model of time (``plan/timing.py``) was compared with published training runs. The
kinds of runs that it misses most are declared here, so that a plan of such a kind can
say so. A row leaves the table in the change that mends the model for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maxlm.plan.topology import Topology

NUM_PUBLISHED_RUNS = 116
"""Published training runs that the predictions were compared with."""


@dataclass(frozen=True)
class KnownTimeError:
    """A kind of plan, and how far its predicted speed is off. A condition left at its
    default holds of every plan."""

    kind: str
    """Key of the kind, for machines."""
    plans: str
    """Plans of this kind, in words."""
    deviation: str
    """Error of the predicted speed, in words."""
    platform: str | None = None
    chip: str | None = None
    min_seq_len: int = 0
    """Shortest sequence, in tokens."""
    split_axes: tuple[str, ...] = ()
    """Mesh axes that all have several devices."""
    has_experts: bool = False

    def applies_to(
        self,
        topology: Topology,
        mesh_sizes: Mapping[str, int],
        seq_len: int,
        has_experts: bool,
    ) -> bool:
        """Returns whether a plan on a machine is of this kind."""
        return (
            self.platform in (None, topology.platform)
            and self.chip in (None, topology.kind)
            and seq_len >= self.min_seq_len
            and all(mesh_sizes[axis] > 1 for axis in self.split_axes)
            and (has_experts or not self.has_experts)
        )


KNOWN_TIME_ERRORS = (
    KnownTimeError(
        kind="gpu_tensor_stage",
        plans="GPUs with tensor × stage",
        deviation="60–70% too slow",
        platform="gpu",
        split_axes=("tensor", "stage"),
    ),
    KnownTimeError(
        kind="h100_long_sequences",
        plans="H100 at ≥ 8,192 tokens",
        deviation="38% too fast",
        chip="h100",
        min_seq_len=8192,
    ),
    KnownTimeError(
        kind="h100_context",
        plans="H100 with context parallelism",
        deviation="46–105% too fast",
        chip="h100",
        split_axes=("context",),
    ),
    KnownTimeError(
        kind="experts",
        plans="mixtures of experts",
        deviation="34–98% too fast",
        has_experts=True,
    ),
    KnownTimeError(
        kind="a100",
        plans="A100",
        deviation="22% too slow",
        chip="a100",
    ),
)


def find_known_time_errors(
    topology: Topology, mesh_sizes: Mapping[str, int], seq_len: int, has_experts: bool
) -> tuple[KnownTimeError, ...]:
    """Returns the kinds of known errors that a plan falls into, in the table's
    order."""
    return tuple(
        error
        for error in KNOWN_TIME_ERRORS
        if error.applies_to(topology, mesh_sizes, seq_len, has_experts)
    )


def format_known_time_errors(errors: Sequence[KnownTimeError]) -> str:
    """Formats the errors as one line; empty: there are none."""
    if not errors:
        return ""
    kinds = "; ".join(f"{error.plans} {error.deviation}" for error in errors)
    runs = f"compared with {NUM_PUBLISHED_RUNS} published runs"
    return f"speeds known to be wrong ({runs}): {kinds}"
