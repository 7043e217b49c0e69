"""What a selective scan reads.

Shapes: R rows, T tokens, F channels, N numbers of state a channel.
"""

from typing import NamedTuple

import jax


class ScanParams(NamedTuple):
    """Arguments of a scan, complete (see
    :func:`~pallas_kernels.selective_scan.selective_scan`), or their gradients in the
    same shapes and dtypes, without ``starts``."""

    x: jax.Array
    """[R, T, F]."""
    dt: jax.Array
    """[R, T, F]."""
    A: jax.Array
    """[F, N]."""
    B: jax.Array
    """[R, T, N]."""
    C: jax.Array
    """[R, T, N]."""
    D: jax.Array
    """[F]."""
    dt_bias: jax.Array | None
    """[F]; None: dt are step sizes as they are."""
    starts: jax.Array | None
    """bool [R, T]."""
    state: jax.Array
    """[R, F, N], in the dtype of the scan's arithmetic."""
