"""What attention adds to scores and takes from them, beside q·k.

A score of a query at distance d from a key is, in this order::

    s = scale · q·k
    s = soft_cap · tanh(s / soft_cap)
    s = s − slope · d + bias[d]

and the softmax over a query's scores has its head's sink beside them.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax

from pallas_kernels.attention import sink_gradient


def limit_window(window: int | None, chunk: int | None) -> int | None:
    """Returns the last tokens, itself included, that a token may see where it sees
    ``window`` of them and none before its chunk of ``chunk`` positions; None: all."""
    if window is None or chunk is None:
        return window or chunk
    return min(window, chunk)


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
        """Returns the gradients of these terms.

        Args:
            lse, delta: log-sum-exps and ``compute_row_delta`` of the queries, fp32
                [B, S, N].
            d_biases: the biases' gradient, which the attention kernel returns.
        """
        d_sinks = None
        if self.sinks is not None:
            d_sinks = sink_gradient(self.sinks, lse, delta)
        return HeadTerms(None, d_biases, d_sinks)


@dataclass(frozen=True)
class AttentionTerms:
    """Terms of one layer's attention; each may be left out."""

    window: int | None = None
    """Tokens that a token sees, itself included; None: all before it."""
    scale: float | None = None
    """Factor on q·k; None: head_dim^−0.5."""
    soft_cap: float | None = None
    slopes: jax.Array | None = None
    """[N], of ALiBi: a constant."""
    biases: jax.Array | None = None
    """[N, 2R + 1], learnt, by distance −R to R."""
    sinks: jax.Array | None = None
    """[N], learnt: a logit of each query head whose weight goes to no token."""
    chunk: int | None = None
    """With a cache: positions are cut into chunks of so many, and a token sees those of
    its own alone; without one segments say so. None: one chunk."""

    @property
    def by_head(self) -> HeadTerms:
        """The terms that are arrays, one row a query head."""
        return HeadTerms(self.slopes, self.biases, self.sinks)

    def with_head_terms(self, by_head: HeadTerms) -> "AttentionTerms":
        """Returns these terms with other arrays, such as those of a device's heads."""
        return replace(self, **by_head._asdict())
