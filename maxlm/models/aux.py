"""Losses and statistics that layers return beside hidden states."""

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Aux:
    """Sums over layers and tokens."""

    loss: jax.Array | float = 0.0
    """Loss to be added to the task's own, as it is."""
    sums: dict[str, jax.Array] = field(default_factory=dict)
    """Sums to be logged. Those named ``expert_*`` are of experts' loads, in
    assignments."""
    routes: jax.Array | None = None
    """Where they are asked for, the experts that each token met: int32 [B, S, k] of one
    layer; of a model int8 or int16 [B, S, layers with experts, k]."""

    def plus(self, other: "Aux") -> "Aux":
        """Adds up both; sums that only one has stay. Routes stay those of this one, or
        are the other's."""
        sums = {**self.sums, **other.sums}
        for name in self.sums.keys() & other.sums.keys():
            sums[name] = self.sums[name] + other.sums[name]
        routes = other.routes if self.routes is None else self.routes
        return Aux(self.loss + other.loss, sums, routes)
