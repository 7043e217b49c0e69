"""Tables indexed by integers: token embeddings, learned positions."""

from typing import Any

import jax
from flax import nnx

from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.params import declare, read_weight, truncated_normal
from maxlm.parallel.embedding import embed_tokens
from maxlm.parallel.local import get_layout, parse_spec
from maxlm.sharding import AxisRules


class Embedding(nnx.Module):
    """A table [V, D]; indices outside it give NaN rather than a wrong row."""

    def __init__(
        self, axis: str | None, size: int, d_model: int, std: float, *, rules: AxisRules, dtype: Any
    ):
        self.rules, self.dtype = rules, dtype
        self.table = declare((size, d_model), (axis, "embed"), truncated_normal(std), "table")

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [..., S] → [..., S, D] in the compute dtype, for the residual stream."""
        table = read_weight(self.table, self.rules, accumulation_dtype(self.dtype))
        lead = get_layout(ids)[:-1]
        residual, embed = parse_spec(self.rules.spec("residual", "embed"), 2)
        return embed_tokens(table.value, ids, table.used, (*lead, residual, embed), self.dtype)
