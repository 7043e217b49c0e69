"""Block sizes that peers try, those first that won most often in a search over 128 to 2,048."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Blocks = Sequence[int]
_SHORT = 1024
"""Keys that a query reaches at most, up to which large blocks compute more than they save."""


class Tried(NamedTuple):
    forward: Sequence[Blocks]
    backward: Sequence[Sequence[Blocks]]
    """Of the kernel for dK and dV, and where dQ has a kernel of its own, of that."""


def _jax_splash(reach: int) -> Tried:
    if reach <= _SHORT:
        # One kernel for all gradients walks over all blocks of queries, whatever the mask.
        return Tried(
            [(512, 512, 512), (1024, 1024, 512)],
            [((512, 512, 512), (512, 512)), ((1024, 1024, 512), (1024, 1024)), ((512, 512, 512),)],
        )
    return Tried(
        [(1024, 1024, 512), (1024, 1024, 256)],
        [((1024, 1024, 1024),), ((1024, 1024, 512),), ((1024, 1024, 512), (1024, 1024))],
    )


def _tokamax_splash(reach: int) -> Tried:
    if reach <= _SHORT:
        return Tried(
            [(512, 512, 512), (1024, 1024, 512), (256, 512, 512)],
            [((512, 512, 512),), ((1024, 1024, 512),), ((256, 512, 512),)],
        )
    return Tried(
        [(1024, 1024, 256), (1024, 1024, 512)],
        [((1024, 1024, 1024),), ((1024, 1024, 512),), ((512, 1024, 512),)],
    )


def _jax_flash(reach: int) -> Tried:
    del reach  # It computes every block under the diagonal.
    return Tried(
        [(1024, 1024, 1024), (512, 512, 512)],
        [
            ((1024, 512, 1024, 1024), (1024, 1024, 512)),
            ((1024, 1024, 1024, 1024), (1024, 1024, 1024)),
            ((512, 512, 512, 512), (512, 512, 512)),
        ],
    )


PEERS: dict[str, Callable[[int], Tried]] = {
    "jax splash": _jax_splash,
    "jax flash": _jax_flash,
    "tokamax splash": _tokamax_splash,
}
"""By the number of keys that the mask lets a query reach at most."""
