"""The public functions: they check arguments and choose an implementation."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chips import get_chip
from pallas_kernels.linear_cross_entropy import tpu, xla
from pallas_kernels.linear_cross_entropy.blocks import CrossEntropyTiling, can_tile
from pallas_kernels.linear_cross_entropy.parts import Loss, Sums

Implementation = Literal["tpu", "xla"]


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk: int = 1024,
    implementation: Implementation | None = None,
    blocks: CrossEntropyTiling | None = None,
    interpret: Any = False,
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
        soft_cap: logits become cap · tanh(logits / cap), the bias included (Gemma 2, Riviere et
            al. 2024, §2).
        chunk: of "xla", tokens whose logits exist at once.
        implementation: "tpu": a Pallas kernel, which keeps logits in VMEM; "xla": any backend,
            [chunk, V] logits in memory; None: "tpu" where the program is compiled for a TPU whose
            VMEM holds its smallest blocks and there is no bias, "xla" elsewhere.
        blocks: of "tpu", its kernels' block sizes; None: as large as VMEM holds.
        interpret: of "tpu", as ``pallas_call`` takes it.

    Returns:
        (loss with the z term, cross-entropy without it), fp32 scalars, sums over tokens. Only the
        first is differentiable, in ``hidden``, ``head`` and ``bias``.

    Raises:
        ValueError: shapes that do not belong together, soft_cap ≤ 0, chunk < 1, a bias for
            "tpu", or blocks that are no multiples of 128 or that the chip's VMEM does not hold.
    """
    run = partial(
        loss_and_gradients,
        z_loss=z_loss,
        soft_cap=soft_cap,
        chunk=chunk,
        implementation=implementation,
        blocks=blocks,
        interpret=interpret,
    )
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
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk: int = 1024,
    implementation: Implementation | None = None,
    blocks: CrossEntropyTiling | None = None,
    interpret: Any = False,
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
    _check(hidden, head, targets, weights, soft_cap, chunk)
    _check_bias(bias, head, implementation)
    share = (hidden, head, targets - first, weights)
    options: dict[str, Any] = {
        "axes": axes,
        "gradient": gradient,
        "z_loss": z_loss,
        "soft_cap": soft_cap,
    }
    by_xla = partial(xla.loss_and_gradients, **options, bias=bias, chunk=chunk)
    by_tpu = partial(tpu.loss_and_gradients, **options, blocks=blocks, interpret=interpret)
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


def _check(hidden, head, targets, weights, soft_cap, chunk):
    shapes = f"hidden {hidden.shape}, head {head.shape}"
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(f"hidden is [T, D] and head [D, V]; got {shapes}")
    if 0 in hidden.shape or head.shape[1] == 0:
        raise ValueError(f"no size may be 0; got {shapes}")
    if hidden.dtype != head.dtype or not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise ValueError(
            f"hidden and head have one floating dtype; got {hidden.dtype}, {head.dtype}"
        )
    if targets.shape != hidden.shape[:1] or weights.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets and weights are [T] with T = {hidden.shape[0]}; "
            f"got {targets.shape} and {weights.shape}"
        )
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is above 0; got {soft_cap}")
    if chunk < 1:
        raise ValueError(f"chunk is at least 1; got {chunk}")


def _check_bias(bias, head, implementation):
    if bias is None:
        return
    if bias.shape != head.shape[1:] or bias.dtype != jnp.float32:
        raise ValueError(
            f"bias is fp32 [V] with V = {head.shape[1]}; got {bias.dtype} {bias.shape}"
        )
    if implementation == "tpu":
        raise ValueError('implementation="tpu" takes no bias: use "xla" or None')
