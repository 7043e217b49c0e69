"""Cross-entropy of a linear head by Pallas TPU kernels: logits stay in VMEM.

Four matrix products in all: logits and the gradient of the hidden states in one kernel, logits
again and the gradient of the head in another.

The first kernel forms, of each token, the softmax's mean of the head's rows as attention does its
output (Dao et al. 2022), but without the target's row. That row's part has the coefficient p − 1,
which for a confident token is a small difference: it is taken in fp32 and added here.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import get_chip
from pallas_kernels.linear_cross_entropy.blocks import (
    CrossEntropyTiling,
    check_tiling,
    choose_tiling,
)
from pallas_kernels.linear_cross_entropy.parts import (
    CrossEntropyGradients,
    Loss,
    apply_soft_cap,
    reduce_logsumexp,
    soft_cap_gradient,
    sum_losses,
)


def loss_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    axes: tuple[str, ...],
    gradient: bool,
    z_loss: float,
    soft_cap: float | None,
    blocks: CrossEntropyTiling | None,
    interpret: Any,
) -> Loss:
    """See :func:`pallas_kernels.linear_cross_entropy.loss_and_gradients`; targets are counted from
    the share's first entry."""
    from pallas_kernels.linear_cross_entropy import kernels  # Pallas is slow to import.

    tokens, vocab, core = len(hidden), head.shape[1], get_chip()
    if blocks is None:
        blocks = choose_tiling(hidden.shape, vocab, hidden.dtype, core)
    else:
        check_tiling(blocks, hidden.shape[1], hidden.dtype, core)
    how: dict[str, Any] = {"soft_cap": soft_cap, "chip": core, "interpret": interpret}
    # Rows of a table are whole tiles; XLA gives the head that layout where it is made.
    table = head.T
    found = (targets >= 0) & (targets < vocab)
    rows = table[jnp.clip(targets, 0, vocab - 1)].astype(jnp.float32)
    target = apply_soft_cap(jnp.sum(hidden.astype(jnp.float32) * rows, axis=1), soft_cap)
    # Padding stands in no block of the vocabulary.
    padding = -tokens % math.lcm(*(b.tokens for b in blocks))
    padded = jnp.pad(hidden, ((0, padding), (0, 0)))
    own_targets = jnp.pad(jnp.where(found, targets, -1), (0, padding), constant_values=-1)

    rest, mean = kernels.forward(
        padded, table, own_targets, blocks=blocks.forward, gradient=gradient, **how
    )
    rest = rest[:tokens]
    own = jnp.where(found, jnp.logaddexp(rest, target), rest)
    logsumexp = reduce_logsumexp(own, axes)
    whole_target = jnp.where(found, target, 0.0)
    whole_target = jax.lax.psum(whole_target, axes) if axes else whole_target
    sums, d_logsumexp = sum_losses(logsumexp, whole_target, weights, z_loss)
    if mean is None:
        return sums, None

    of_rest = d_logsumexp * jnp.exp(rest - logsumexp)
    of_target = d_logsumexp * jnp.exp(target - logsumexp) - weights
    of_target = jnp.where(found, of_target * soft_cap_gradient(target, soft_cap), 0.0)
    d_hidden = of_rest[:, None] * mean[:tokens] + of_target[:, None] * rows
    d_table = kernels.head_gradient(
        padded,
        table,
        own_targets,
        *(jnp.pad(x, (0, padding)) for x in (logsumexp, d_logsumexp, -weights)),
        blocks=blocks.head_gradient,
        **how,
    )
    return sums, CrossEntropyGradients(d_hidden.astype(hidden.dtype), d_table.T, bias=None)
