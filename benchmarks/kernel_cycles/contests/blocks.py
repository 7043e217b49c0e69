"""Block sizes that peers try: of a search over 128 to 2,048 those that won somewhere,
the most likely first."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Blocks = Sequence[int]
_SHORT = 1024
"""Keys that a query reaches at most, from which on large blocks save more than they
compute."""


class Tried(NamedTuple):
    forward: Sequence[Blocks]
    backward: Sequence[Sequence[Blocks]]
    """Of the kernel for dK and dV, and where dQ has a kernel of its own, of that."""

    def fitting(self, seq: int) -> "Tried":
        """Those that divide the sequence."""

        def fits(blocks: Blocks) -> bool:
            return all(seq % block == 0 for block in blocks)

        return Tried(
            [blocks for blocks in self.forward if fits(blocks)],
            [kernels for kernels in self.backward if all(map(fits, kernels))],
        )


_SMALL = Tried([(512, 512, 512)], [((512, 512, 512),)])
_WINDOW = Tried(
    [(512, 512, 512), (1024, 1024, 512)], [((1024, 1024, 512),), ((1024, 2048, 512),)]
)
_LARGE = Tried(
    [(1024, 1024, 256), (1024, 1024, 512)],
    [((1024, 1024, 1024),), ((1024, 1024, 512),)],
)


def _jax_splash(reach: int, seq: int) -> Tried:
    if reach < _SHORT:
        return _SMALL
    if reach > _SHORT:
        return _LARGE
    # One kernel for all gradients walks over all blocks of queries, whatever the
    # window.
    apart = ((512, 512, 512), (512, 512))
    together = ((1024, 1024, 512),)
    return _WINDOW._replace(
        backward=[apart, together] if seq > 8 * reach else [together, apart]
    )


def _tokamax_splash(reach: int, seq: int) -> Tried:
    del seq
    if reach < _SHORT:
        return _SMALL
    return _WINDOW if reach == _SHORT else _LARGE


def _jax_flash(reach: int, seq: int) -> Tried:
    del reach, seq  # It computes every block under the diagonal.
    return Tried([(1024, 1024, 1024)], [((1024, 512, 1024, 1024), (1024, 1024, 512))])


_OTHERWISE = 512, 256, 128
"""Where the sequence is no multiple of those."""

PEERS: dict[str, Callable[[int, int], Tried]] = {
    "jax splash": _jax_splash,
    "jax flash": _jax_flash,
    "tokamax splash": _tokamax_splash,
}
"""By the number of keys that the mask lets a query reach at most, and the length of a
sequence."""


def tried(name: str, reach: int, seq: int) -> Tried:
    """What a peer tries, see ``PEERS``; nothing where no block sizes divide the
    sequence."""
    fitting_blocks = PEERS[name](reach, seq).fitting(seq)
    if fitting_blocks.forward and fitting_blocks.backward:
        return fitting_blocks
    sizes = [
        (n,) * (4 if name == "jax flash" else 3) for n in _OTHERWISE if seq % n == 0
    ][:1]
    return Tried([blocks[:3] for blocks in sizes], [(blocks,) for blocks in sizes])
