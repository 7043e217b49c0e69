"""Tables indexed by integers: token embeddings, learned positions."""

from typing import Any

import jax
from flax import nnx

from maxlm.models.params import compute_view, declare, truncated_normal
from maxlm.sharding import AxisRules


class Embedding(nnx.Module):
    """A table [V, D]; indices outside it give NaN rather than a wrong row."""

    def __init__(
        self, axis: str | None, size: int, d_model: int, std: float, *, rules: AxisRules, dtype: Any
    ):
        self.rules, self.dtype = rules, dtype
        self.table = declare((size, d_model), (axis, "embed"), truncated_normal(std), "table")

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [B, S] → [B, S, D] in the compute dtype."""
        table = compute_view(self.table, self.rules, self.dtype)
        # JAX would by default wrap negative indices and clamp the others.
        return table.at[ids].get(
            mode="fill",
            wrap_negative_indices=False,
            out_sharding=self.rules.spec("batch", "seq", "embed"),
        )
