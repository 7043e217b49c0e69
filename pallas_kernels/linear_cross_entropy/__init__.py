"""Cross-entropy of a linear head, whose logits [T, V] never exist at once.

:func:`linear_cross_entropy` is differentiable. :func:`loss_and_gradients` is one device's part of
it, for a caller that splits the tokens or the vocabulary over devices.
"""

from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chips import get_chip
from pallas_kernels.linear_cross_entropy import tpu, xla
from pallas_kernels.linear_cross_entropy.blocks import (
    CrossEntropyBlocks,
    CrossEntropyTiling,
    can_tile,
)
from pallas_kernels.linear_cross_entropy.parts import CrossEntropyGradients, Loss, Sums

__all__ = [
    "CrossEntropyBlocks",
    "CrossEntropyGradients",
    "CrossEntropyTiling",
    "linear_cross_entropy",
    "loss_and_gradients",
]


class CrossEntropyOptions(TypedDict, total=False):
    """How a loss is computed, each with its default where it is left out."""

    z_loss: float
    """Coefficient of Σ weight · logsumexp(logits)²; default 0."""
    soft_cap: float | None
    """Logits become cap · tanh(logits / cap), the bias included (Gemma 2, Riviere et al. 2024, §2);
    default None."""
    chunk: int
    """Of "xla", tokens whose logits exist at once; default 1024."""
    implementation: Literal["tpu", "xla"] | None
    """"tpu": a Pallas kernel, which keeps logits in VMEM; "xla": any backend, [chunk, V] logits in
    memory; None, the default: "tpu" where the program is compiled for a TPU whose VMEM holds its
    smallest blocks and there is no bias, "xla" elsewhere."""
    blocks: CrossEntropyTiling | None
    """Of "tpu", its kernels' block sizes; None, the default: as large as VMEM holds."""
    interpret: Any
    """Of "tpu", as ``pallas_call`` takes it; default False."""


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    **options: Unpack[CrossEntropyOptions],
) -> Sums:
    """Σ weight · (logsumexp(logits) − logits[target] + z_loss · logsumexp(logits)²), with
    logits = cap(hidden · head + bias) in fp32; the z term is that of Chowdhery et al. 2022, §5.

    Where a gradient is wanted it is formed in the forward pass, since with one scalar loss the
    cotangent of the logits is known as soon as their sum is.

    Args:
        hidden: [T, D].
        head: [D, V], in hidden's dtype. For a table [V, D] pass its transpose: no copy is made.
        targets: int [T]. One outside 0..V-1 counts as a logit of 0: give it weight 0.
        weights: fp32 [T]; 0 leaves a token out.
        bias: fp32 [V] or None; no Pallas kernel takes one.

    Returns:
        (loss with the z term, cross-entropy without it), fp32 scalars, sums over tokens. Only the
        first is differentiable, in ``hidden``, ``head`` and ``bias``.

    Raises:
        ValueError: shapes that do not belong together, soft_cap ≤ 0, chunk < 1, a bias for
            "tpu", or blocks that are no multiples of 128 or that the chip's VMEM does not hold.
    """
    run = partial(loss_and_gradients, **options)
    return _differentiable(hidden, head, bias, targets, weights, run)


def loss_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    first: jax.Array | int = 0,
    axes: tuple[str, ...] = (),
    gradient: bool = True,
    **options: Unpack[CrossEntropyOptions],
) -> Loss:
    """Returns the sums of :func:`linear_cross_entropy` over this device's tokens, and their
    gradients; not to be differentiated by JAX.

    Inside ``shard_map``, mesh axes may split the vocabulary: ``head`` [D, V / ways] is then this
    device's share, as is ``bias`` [V / ways], and a few numbers a token cross ``axes``.

    Args: as there; and
        first: the index in the vocabulary of the share's first entry.
        axes: the mesh axes that split the vocabulary.

    Returns:
        The two sums, alike along ``axes``, not yet summed over devices that hold other tokens; and
        the gradients of the first, or None. Along ``axes`` that of hidden is a term of a sum that
        the caller takes.
    """
    if unknown := options.keys() - CrossEntropyOptions.__annotations__.keys():
        raise TypeError(f"unknown options of a cross-entropy: {', '.join(sorted(unknown))}")
    get = options.get
    soft_cap, chunk, implementation = get("soft_cap"), get("chunk", 1024), get("implementation")
    _check(hidden, head, targets, weights, bias, soft_cap, chunk)
    if bias is not None and implementation == "tpu":
        raise ValueError('implementation="tpu" takes no bias: use "xla" or None')
    share = (hidden, head, targets - first, weights)
    own: dict[str, Any] = {"axes": axes, "gradient": gradient, "soft_cap": soft_cap}
    own["z_loss"] = get("z_loss", 0.0)
    by_xla = partial(xla.loss_and_gradients, **own, bias=bias, chunk=chunk)
    own |= {"blocks": get("blocks"), "interpret": get("interpret", False)}
    by_tpu = partial(tpu.loss_and_gradients, **own)
    sizes = hidden.shape, head.shape[1], hidden.dtype
    if implementation is None and bias is None and can_tile(*sizes, get_chip()):
        return lax.platform_dependent(*share, tpu=by_tpu, default=by_xla)
    return (by_tpu if implementation == "tpu" else by_xla)(*share)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _differentiable(hidden, head, bias, targets, weights, run):
    return run(hidden, head, targets, weights, bias=bias, gradient=False)[0]


def _forward(hidden, head, bias, targets, weights, run):
    return run(hidden, head, targets, weights, bias=bias)


def _backward(_, gradients, cotangents):
    scaled = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients)
    return *scaled, None, None


_differentiable.defvjp(_forward, _backward)


def _check(hidden, head, targets, weights, bias, soft_cap, chunk):
    shapes = f"hidden {hidden.shape}, head {head.shape}"
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(f"hidden is [T, D] and head [D, V]; got {shapes}")
    if 0 in hidden.shape or head.shape[1] == 0:
        raise ValueError(f"no size may be 0; got {shapes}")
    if hidden.dtype != head.dtype or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(f"hidden, head: want one floating dtype, not {hidden.dtype}, {head.dtype}")
    if not targets.shape == weights.shape == hidden.shape[:1]:
        raise ValueError(f"targets {targets.shape}, weights {weights.shape}: want [T], {shapes}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is above 0; got {soft_cap}")
    if chunk < 1:
        raise ValueError(f"chunk is at least 1; got {chunk}")
    if bias is not None and (bias.shape != head.shape[1:] or bias.dtype != jnp.float32):
        raise ValueError(f"bias is fp32 [V]; got {bias.dtype} {bias.shape}, {shapes}")
