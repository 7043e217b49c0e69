"""Attention over a part of the batch and of the heads at a time, in a loop.

Parts are cut from arrays as they lie, and put back in place: no copy of the whole in another order.
"""

from typing import Any, NamedTuple

import jax
from jax import lax


class BatchSlice(NamedTuple):
    """Rows of the batch and kv heads, with their query heads, that are attended to at once."""

    shape: tuple[int, int]
    """B and K of the whole."""
    rows: int
    kv_heads: int

    @classmethod
    def of(cls, batch: int, kv_heads: int, most: int) -> "BatchSlice":
        """Parts of at most ``most`` pairs of a row and a kv head, or one: whole rows where these
        fit."""
        if most >= kv_heads:
            return cls((batch, kv_heads), _divisor(batch, most // kv_heads), kv_heads)
        return cls((batch, kv_heads), 1, _divisor(kv_heads, most))

    @property
    def count(self) -> int:
        return self.shape[0] // self.rows * (self.shape[1] // self.kv_heads)

    def cut(self, i: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Part i of arrays [B, S, N or K, ...]."""
        return tuple(
            lax.dynamic_slice(
                x,
                self._start(i, x),
                (self.rows, x.shape[1], x.shape[2] // self._head_parts, *x.shape[3:]),
            )
            for x in arrays
        )

    def cut_rows(self, i: jax.Array, tree: Any) -> Any:
        """The rows of part i of arrays [B or 1, ...] that all heads share."""
        row = i // self._head_parts * self.rows
        return jax.tree.map(
            lambda x: x if len(x) == 1 else lax.dynamic_slice_in_dim(x, row, self.rows), tree
        )

    def cut_heads(self, i: jax.Array, tree: Any) -> Any:
        """The query heads of part i of arrays [N, ...]."""
        head = i % self._head_parts

        def cut(x):
            size = len(x) // self._head_parts
            return lax.dynamic_slice_in_dim(x, head * size, size)

        return jax.tree.map(cut, tree)

    def add_heads(self, i: jax.Array, tree: Any, terms: Any) -> Any:
        """Arrays [N, ...] with a part's terms added to those of its query heads."""
        head = i % self._head_parts

        def add(x, own):
            start = head * len(own)
            own += lax.dynamic_slice_in_dim(x, start, len(own))
            return lax.dynamic_update_slice_in_dim(x, own, start, axis=0)

        return tuple(add(x, own) for x, own in zip(tree, terms, strict=True))

    def put(
        self, i: jax.Array, arrays: tuple[jax.Array, ...], parts: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """The arrays with these parts in their places."""
        return tuple(
            lax.dynamic_update_slice(x, own.astype(x.dtype), self._start(i, x))
            for x, own in zip(arrays, parts, strict=True)
        )

    @property
    def _head_parts(self) -> int:
        return self.shape[1] // self.kv_heads

    def _start(self, i: jax.Array, x: jax.Array) -> tuple[jax.Array | int, ...]:
        row, heads = i // self._head_parts, i % self._head_parts
        return row * self.rows, 0, heads * (x.shape[2] // self._head_parts), *(0,) * (x.ndim - 3)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is not above ``most``; 1 at least."""
    return next(d for d in range(max(1, min(n, most)), 0, -1) if n % d == 0)
