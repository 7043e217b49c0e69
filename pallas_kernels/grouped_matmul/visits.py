"""Which (tile of rows, group) pairs a TPU kernel visits, so that its work follows the rows there
are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GroupVisits(NamedTuple):
    """Pairs in the order of rows, int32 [V] each, V = tiles + groups + 1; the first ``count`` of
    them are used.

    Behind the groups' own may come those of the padding, one for each tile that holds some: they
    read what the visit before them read, so that nothing is fetched for them.
    """

    tile: jax.Array
    """The tile of rows that is read, ..."""
    out_tile: jax.Array
    """... and that is written."""
    group: jax.Array
    """Whose kernel is read, or written."""
    begin: jax.Array
    """First row within the tile that belongs to the group, or to the padding, ..."""
    end: jax.Array
    """... and the row behind the last one."""
    padding: jax.Array
    """1 where the rows belong to no group."""


def plan_group_visits(
    sizes: jax.Array, num_rows: int, tile: int, *, padding: bool
) -> tuple[GroupVisits, jax.Array]:
    """Returns the visits to ``num_rows`` rows in tiles of ``tile``, and their count, int32 [].

    Args:
        sizes: int32 [G], rows of each group; their sum is at most ``num_rows``.
        padding: visit the rows behind the groups', but no empty group; otherwise every group, an
            empty one once with no rows, and no padding.
    """
    num_groups, num_tiles = len(sizes), -(-num_rows // tile)
    lengths = jnp.append(sizes, num_rows - sizes.sum(dtype=jnp.int32))
    ends = jnp.cumsum(lengths, dtype=jnp.int32)
    starts = ends - lengths
    first = starts // tile
    counts = jnp.where(lengths > 0, (ends - 1) // tile - first + 1, 0 if padding else 1)
    counts = counts if padding else counts.at[-1].set(0)
    done = jnp.cumsum(counts, dtype=jnp.int32)

    number = jnp.arange(num_tiles + num_groups + 1, dtype=jnp.int32)
    group = _behind(number, done, num_groups)
    out_tile = _of(first - done + counts, group) + number
    out_tile = jnp.clip(out_tile, 0, num_tiles - 1)  # an empty last group begins behind them
    own = jnp.clip(number, 0, jnp.maximum(done[-2] - 1, 0))
    own_group = _behind(own, done, num_groups - 1)
    own_tile = jnp.clip(_of(first - done + counts, own_group) + own, 0, num_tiles - 1)
    found = GroupVisits(
        tile=own_tile,
        out_tile=out_tile,
        group=own_group,
        begin=jnp.clip(_of(starts, group) - out_tile * tile, 0, tile),
        end=jnp.clip(_of(ends, group) - out_tile * tile, 0, tile),
        padding=(group == num_groups).astype(jnp.int32),
    )
    return found, done[-1]


def _behind(number: jax.Array, done: jax.Array, most: int) -> jax.Array:
    """The group of each visit. Compared with all: a TPU searches and gathers more slowly."""
    return jnp.minimum((number[:, None] >= done).sum(1, dtype=jnp.int32), most)


def _of(values: jax.Array, group: jax.Array) -> jax.Array:
    """``values[group]``, by comparing too."""
    mine = group[:, None] == jnp.arange(len(values))
    return jnp.where(mine, values, 0).sum(1, dtype=jnp.int32)
