"""Sequences that share packed rows, as losses of reinforcement learning sum over
them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class PackedSequences:
    """The sequences of rows [..., S], at most n a row; see :meth:`of_rows`."""

    is_member: jax.Array
    """Whether an entry is of the sequence, bool [..., S, n]."""
    weights: jax.Array
    """1 where the policy drew an entry's target and it counts, else 0, fp32 [...,
    S]."""

    @classmethod
    def of_rows(
        cls, segment_ids: jax.Array, weights: jax.Array, num_segments: int
    ) -> "PackedSequences":
        """Reads the segments 1 to ``num_segments`` of rows; 0 is padding."""
        segment_numbers = jnp.arange(1, num_segments + 1)
        return cls(segment_ids[..., None] == segment_numbers, weights)

    @property
    def is_present(self) -> jax.Array:
        """Whether a sequence is there, also one without an entry that counts, bool
        [..., n]."""
        return self.is_member.any(-2)

    @property
    def num_present(self) -> jax.Array:
        """Sequences of all rows, fp32 []."""
        return self.is_present.sum(dtype=jnp.float32)

    @property
    def num_weighted(self) -> jax.Array:
        """Entries that count, of all rows, fp32 []."""
        return self.weights.sum()

    @property
    def lengths(self) -> jax.Array:
        """Entries of each sequence that count, fp32 [..., n]."""
        return self.sum(jnp.ones_like(self.weights))

    def sum(self, values: jax.Array) -> jax.Array:
        """Sums values [..., S] over each sequence's entries that count: [..., n]."""
        # Where nothing counts, a value may be anything.
        values = jnp.where(self.weights != 0, values * self.weights, 0.0)
        return jnp.where(self.is_member, values[..., None], 0.0).sum(-2)

    def mean(self, values: jax.Array) -> jax.Array:
        """Averages values [..., S] over each sequence's entries that count: [..., n];
        0 where none does."""
        return self.sum(values) / jnp.maximum(self.lengths, 1.0)

    def spread(self, values: jax.Array) -> jax.Array:
        """Gives each entry its sequence's value: [..., n] → [..., S]; 0 in padding."""
        return jnp.where(self.is_member, values[..., None, :], 0.0).sum(-1)

    def total(self, values: jax.Array) -> jax.Array:
        """Sums values [..., S] over all entries that count: []."""
        return jnp.where(self.weights != 0, values * self.weights, 0.0).sum()
