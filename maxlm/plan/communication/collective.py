"""A collective of a training step."""

from dataclasses import dataclass
from typing import Literal

from maxlm.plan.network import sent_bytes
from maxlm.plan.workload import MeshSplit, Number

Phase = Literal["forward", "backward", "once"]
FP32 = 4
PASSES: tuple[Phase, Phase] = ("forward", "backward")


@dataclass(frozen=True)
class PlannedCollective:
    """All runs of one collective in a step."""

    what: str
    kind: str
    axes: tuple[str, ...]
    whole_bytes: Number
    """See ``plan/network.py: sent_bytes``."""
    count: Number
    """Runs a step."""
    phase: Phase
    waits: bool
    """Whether the computation next in line needs it at once: activations do; weights can be
    gathered, and their gradients scattered, beside other layers' work."""

    def sent(self, split: MeshSplit) -> Number:
        """Bytes that a device sends in a step."""
        return self.count * sent_bytes(self.kind, split.ways(self.axes), self.whole_bytes)
