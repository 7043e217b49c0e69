"""Context parallelism: self-attention over a sequence that is split over devices.

Three methods, the same numbers; all on shards, with gradients of their own:

- ``all_gather``: every device gathers all keys and values, and attends with its own
  queries. Two large collectives and a whole sequence's keys in memory; simple, and fast
  where kv heads are few.
- ``ring``: keys and values travel around the ring of devices, a block at a time, while
  the device computes with the block it has (Liu et al. 2023, ring attention). Memory
  for two blocks; the transfer hides behind the computation where blocks are long.
- ``ulysses``: an all-to-all turns a share of the sequence with all heads into the whole
  sequence with a share of heads, and one more turns the output back (Jacobs et al.
  2023). The least traffic where heads are many; its size is limited by the query heads.

In sequence order a causal mask gives the first device the least work and the last the
most, and all wait for it. **Balanced order** cuts the sequence into 2n chunks for n
devices and gives device i the chunks i and 2n−1−i, so that ``all_gather`` and ``ring``
do equal work everywhere: half of what no mask would need. Ulysses is balanced in any
order, and so is a window much shorter than a device's share of the sequence; in
sequence order the ring then ends at the last device in reach.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.errors import Requirement
from maxlm.parallel.local import Axes, axis_size
from maxlm.sharding import AxisRules
from pallas_kernels.attention import sink_gradient

ContextMethod = Literal["all_gather", "ring", "ulysses"]
Segments = tuple[jax.Array, jax.Array] | None


class SequenceSplit(NamedTuple):
    """Split of a sequence over devices, and its attention mask."""

    axes: Axes
    """The mesh axes over which rows are split."""
    method: ContextMethod
    balanced: bool
    causal: bool
    window: int | None
    scale: float | None = None
    """Factor on q·k; None: by the head size."""
    soft_cap: float | None = None

    @property
    def num_shards(self) -> int:
        return axis_size(self.axes)

    @property
    def mask_kwargs(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window}

    def score_kwargs(self, head_terms: "HeadTerms") -> dict[str, Any]:
        return {"scale": self.scale, "soft_cap": self.soft_cap, **head_terms._asdict()}

    @property
    def chunks_per_device(self) -> int:
        """Runs of neighbouring tokens that a device holds."""
        return 2 if self.balanced else 1

    def last_ring_step(self, tokens_per_device: int) -> int:
        """Counts the devices before its own, of ``tokens_per_device`` tokens each, that
        hold keys a device may need. Later devices' keys pass by as the ring closes."""
        window = None if self.balanced else self.window
        return int(count_ring_steps(self.num_shards, tokens_per_device, window))

    def chunk_starts(self, device_index: Any, chunk_size: int) -> list[Any]:
        """Returns the index in the sequence of the first token of each chunk, of
        ``chunk_size`` tokens, of the device at ``device_index`` along ``axes``."""
        if not self.balanced:
            return [device_index * chunk_size]
        return [
            device_index * chunk_size,
            (2 * self.num_shards - 1 - device_index) * chunk_size,
        ]


def count_ring_steps(
    num_shards: Any, tokens_per_device: Any, window: int | None
) -> Any:
    """Returns the devices before one's own that hold keys it may need, of so many that
    hold the sequence in order; numbers or arrays of them."""
    others = num_shards - 1
    if window is None:
        return others
    return np.minimum(others, (window + tokens_per_device - 2) // tokens_per_device)


class HeadTerms(NamedTuple):
    """Each query head's own terms of the softmax, fp32; or None."""

    slopes: jax.Array | None = None
    """[N], constants; times the distance of query and key, subtracted from scores."""
    biases: jax.Array | None = None
    """[N, 2R + 1], with gradients; added to scores by distance."""
    sinks: jax.Array | None = None
    """[N], with gradients: a logit beside the scores."""

    def compute_gradients(
        self, lse: jax.Array, delta: jax.Array, d_biases: jax.Array | None = None
    ) -> "HeadTerms":
        """Returns gradients of these, from log-sum-exps and ``compute_row_delta``, fp32
        [B, S, N], and those of biases."""
        own = None if self.sinks is None else sink_gradient(self.sinks, lse, delta)
        return HeadTerms(None, d_biases, own)


def require_context(
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    *,
    rules: AxisRules,
    sizes: Mapping[str, Any],
    method: ContextMethod = "all_gather",
    balanced: bool = False,
) -> Iterator[Requirement]:
    """Requires that attention can be split over the sequence: the length divides,
    Ulysses can share out the heads, no query head's kv head lies on another device.

    Args:
        seq_len: tokens in a row of the batch.
        rules: compute rules.
        sizes: mesh axis → devices.
    """
    yield from require_keys_beside_queries(num_heads, num_kv_heads, rules, sizes)
    seq, heads = rules.mesh_axes("seq"), rules.mesh_axes("heads")
    shares, ways = (prod(sizes[axis] for axis in axes) for axes in (heads, seq))
    alone = np.equal(ways, 1)
    divides = seq_len % (ways * (2 if balanced else 1)) == 0
    yield Requirement(alone | divides, partial(_length_error, seq_len, ways, balanced))
    split = _named(heads + seq, sizes)
    what = f"ulysses splits query heads, and {num_heads} do not divide over {split}"
    fix = "use ring or all_gather, or fewer devices on these axes"
    refuse = partial(MaxlmError, what, where="parallel.context", fix=fix)
    divides = num_heads % (shares * ways) == 0
    yield Requirement(alone | (method != "ulysses") | divides, refuse)


def require_keys_beside_queries(
    num_heads: int, num_kv_heads: int, rules: AxisRules, sizes: Mapping[str, Any]
) -> Iterator[Requirement]:
    """Requires that kv heads are split as query heads are, or whole where each device's
    query heads are whole groups, or lie within one."""
    heads, kv_heads = rules.mesh_axes("heads"), rules.mesh_axes("kv_heads")
    differing = prod(sizes[axis] for axis in set(heads) ^ set(kv_heads))
    whole = np.equal(prod(sizes[axis] for axis in kv_heads), 1)
    what = f"heads are on mesh axes {_named(heads, sizes)}, kv_heads on {_named(kv_heads, sizes)}"
    where, fix = "sharding.compute.kv_heads", "give them the axes of heads, or null"
    ordered = [a for a in heads if a in kv_heads] == [a for a in kv_heads if a in heads]
    refuse = partial(MaxlmError, what, where=where, fix=fix)
    yield Requirement(whole | (np.equal(differing, 1) & ordered), refuse)
    shares = prod(sizes[axis] for axis in heads)
    group = max(num_heads // num_kv_heads, 1)
    own = num_heads // shares
    aligned = (
        (own % group == 0)
        | (group % np.maximum(own, 1) == 0)
        | (num_heads % shares != 0)
    )
    what = f"{own} query heads a device straddle the groups of {group} that share a kv head"
    fix = f"split heads over a multiple or a divisor of {num_kv_heads} devices"
    refuse = partial(MaxlmError, what, where=where, fix=fix)
    yield Requirement(np.logical_not(whole) | aligned, refuse)


def _named(axes: Axes, sizes: Mapping[str, int]) -> str:
    return "·".join(f"{axis}={sizes[axis]}" for axis in axes) or "none"


def _length_error(length: int, ways: int, balanced: bool) -> MaxlmError:
    chunks = ways * (2 if balanced else 1)
    below, above = length // chunks * chunks, -(-length // chunks) * chunks
    return MaxlmError(
        f"a sequence of {length} does not divide into {chunks} chunks "
        f"({ways} context "
        f"shards{', two chunks each when balanced' if balanced else ''})",
        where="data.seq_len",
        fix=f"use {f'{below} or ' if below else ''}{above}"
        + (
            ", or parallel.balance_sequence=false"
            if balanced and length % ways == 0
            else ""
        ),
    )


def sequence_order_indices(length: int, num_shards: int, balanced: bool) -> np.ndarray:
    """Returns the index of the token that stands at each place, int [length], where
    device i of n holds places i·length/n and on; raises MaxlmError where the length
    does not divide."""
    if length % (num_shards * (2 if balanced else 1)):
        raise _length_error(length, num_shards, balanced)
    if not balanced:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * num_shards, -1)
    return np.stack([chunks[:num_shards], chunks[num_shards:][::-1]], axis=1).reshape(
        -1
    )
