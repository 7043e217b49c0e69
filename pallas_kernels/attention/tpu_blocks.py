"""Block sizes of the TPU kernels."""

from typing import NamedTuple

import jax


class Blocks(NamedTuple):
    """Queries and keys of a block, and of a tile."""

    q: int
    k: int
    tile_q: int
    tile_k: int


def forward_blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> Blocks:
    S, T = q.shape[1], k.shape[1]
    bq, bk = _fit(S, 1024), _fit(T, 1024)
    bk = min(bq, bk)
    return Blocks(bq, bk, min(128, bq), min(256, bk))


def backward_blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> Blocks:
    S, T = q.shape[1], k.shape[1]
    bq, bk = _fit(S, 1024), _fit(T, 1024)
    bk = min(bq, bk)
    return Blocks(bq, bk, min(512, bq), min(512, bk))


def _fit(n: int, most: int) -> int:
    """The largest power of two, 128 to ``most``, that pads n by at most a ninth more than 128s."""
    size = most
    while size > 128 and -(-n // size) * size * 9 > -(-n // 128) * 128 * 10:
        size //= 2
    return size
