"""States that pass from token to token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.models.caches.ragged import RaggedBatch, run_rows
from maxlm.parallel.local import map_shards
from maxlm.sharding import AxisRules


class RecurrentCache(NamedTuple):
    """A state that passes from token to token, for every row [D, R, ...]; zeros before the
    first."""

    state: Any

    def run(
        self,
        advance: Callable[..., tuple[Any, jax.Array]],
        x: jax.Array,
        batch: RaggedBatch,
        rules: AxisRules,
        feature_axis: str,
        *params: jax.Array,
    ) -> tuple[jax.Array, "RecurrentCache"]:
        """Runs tokens through the recurrence; returns its outputs, and the cache after them.

        Args:
            advance: ``(states [n, ...], x [n, T, F], live bool [n, T], *params) -> (states, y [n,
                T, F])`` for rows side by side, on each device with its own features; tokens that
                are not ``live`` leave a state as it was.
            x: [D, S, F].
            feature_axis: the logical axis of F, of the states' last dimension and the params'.
        """

        def local(states, x, batch, params):
            states, x, batch = jax.tree.map(lambda a: a[0], (states, x, batch))

            def advance_fresh(states, x, where):
                begins = where.begins
                fresh = jax.tree.map(
                    lambda s: jnp.where(begins.reshape(-1, *(1,) * (s.ndim - 1)), 0, s), states
                )
                return advance(fresh, x, where.live, *params)

            out = run_rows(advance_fresh, states, x, batch)
            return jax.tree.map(lambda a: a[None], out)

        features = rules.spec("batch", None, feature_axis)
        inner = [None] * (jax.tree.leaves(self.state)[0].ndim - 3)
        states = rules.spec("batch", None, *inner, feature_axis)
        own = tuple(rules.spec(*(None,) * (a.ndim - 1), feature_axis) for a in params)
        specs = states, features, rules.spec("batch"), own
        states, y = map_shards(local, specs, (states, features))(self.state, x, batch, params)
        return y, RecurrentCache(states)
