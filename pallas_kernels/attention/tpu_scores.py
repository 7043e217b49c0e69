"""Scores of a tile inside a TPU kernel: scale, cap, slope and mask, in units of log2.

Softmax by powers of two: exp(x) = exp2(x · log2 e), and the factor joins the scale.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import and_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.how import How

# Finite, so that a row with every key masked gives no NaN on the way to its zeros.
MASKED = -1e30
LOG2_E = math.log2(math.e)


class Setting(NamedTuple):
    """Static facts of a call, the same for all of its tiles."""

    how: How
    kv_heads: int
    group: int
    """Query heads a kv head."""
    shift: int | None
    """Position of the first query less that of the first key; None: ``ints[0]``."""
    keys: int | None
    """Keys that are no padding; None: all."""
    tables: int
    """Rows of the batch with a table of their own, or 1."""
    prefix: bool
    slopes: bool
    sinks: bool
    interpreted: bool = False
    """Whether no TPU runs this."""

    def scalars(self, ints: Any, floats: Any) -> "Scalars":
        """In a kernel: those of this step of the grid (kv heads of all rows, group, ...)."""
        kv, g = pl.program_id(0), pl.program_id(1)
        row = lax.div(kv, self.kv_heads)
        head = lax.rem(kv, self.kv_heads) * self.group + g
        return Scalars(
            row,
            ints[0] if self.shift is None else self.shift,
            ints[1],
            ints[2],
            ints[3 + row] if self.prefix else None,
            floats[0, head] if self.slopes else None,
            floats[1, head] if self.sinks else None,
        )


class Scalars(NamedTuple):
    row: Any
    """Of the batch."""
    shift: Any
    put: Any
    get: Any
    """Zeros, which the compiler does not know: what is stored at [put] it must read back at [get].
    Were both the same to it, values would stay in registers between the stages of a tile, until
    there are too many and it spills them at the wrong time."""
    prefix: Any
    """Keys that every query sees."""
    slope: Any
    sink: Any


def stages(count: int, these: Sequence[tuple[int, Callable[[int], None]]]) -> None:
    """Call every stage for each of ``count`` tiles, a stage of (ahead, function) so many tiles
    before the one with 0: neighbours in the program overlap on the machine."""
    first, last = max(a for a, _ in these), min(a for a, _ in these)
    for n in range(-first, count - last):
        for ahead, stage in these:
            if 0 <= n + ahead < count:
                stage(n + ahead)


class Spot(NamedTuple):
    """Where a tile stands."""

    distance: Any
    """Position of its first query less that of its first key."""
    key: Any
    """Index of its first key."""
    q_segments: jax.Array | None
    """Ids, broadcast against ``k_segments``; −1 sees nothing."""
    k_segments: jax.Array | None


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """fp32 matrix product over one axis of each; fp32 operands are not rounded to bf16."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), exact, preferred_element_type=jnp.float32
    )


def scaled(products: jax.Array, how: How) -> tuple[jax.Array, jax.Array | None]:
    """fp32 q · k to scores · log2 e; and with a cap its derivative, by the scaled product."""
    if how.soft_cap is None:
        return products * (how.scale * LOG2_E), None
    tanh = jnp.tanh(products * (how.scale / how.soft_cap))
    return tanh * (how.soft_cap * LOG2_E), 1.0 - tanh * tanh


def placed(
    scores: jax.Array,
    masked: bool,
    spot: Spot,
    setting: Setting,
    scalars: Scalars,
    query_axis: int,
) -> jax.Array:
    """Scores with ALiBi's slope (Press et al. 2022), and MASKED where a query may not see a key: by
    its position, if ``masked``, and by its segment, where the spot has these."""
    how = setting.how
    seen = []
    if spot.q_segments is not None:
        seen.append(spot.q_segments == spot.k_segments)
    if not masked and not setting.slopes:
        return jnp.where(seen[0], scores, MASKED) if seen else scores
    query = lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
    key = lax.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis)
    behind = (query + spot.distance) - key
    if setting.slopes:
        away = jnp.abs(behind).astype(jnp.float32)
        scores = scores - away * (scalars.slope * LOG2_E)
    if masked and how.causal:
        near = behind >= 0
        if how.window is not None:
            near &= behind < how.window
        if setting.prefix:
            near |= key < scalars.prefix - spot.key
        seen.append(near)
    if masked and setting.keys is not None:
        seen.append(key < setting.keys - spot.key)
    return jnp.where(reduce(and_, seen), scores, MASKED) if seen else scores
