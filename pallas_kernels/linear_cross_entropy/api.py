"""What callers use: arguments are checked and an implementation is chosen here."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chips import current_chip
from pallas_kernels.linear_cross_entropy import tpu, xla
from pallas_kernels.linear_cross_entropy.blocks import Tiling, fits
from pallas_kernels.linear_cross_entropy.parts import Loss, Sums

Implementation = Literal["tpu", "xla"]


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int = 1024,
    implementation: Implementation | None = None,
    blocks: Tiling | None = None,
    interpret: Any = False,
) -> Sums:
    """Σ weight · (logsumexp(logits) − logits[target] + z_loss · logsumexp(logits)²), with
    logits = hidden · head in fp32; the second term is that of Chowdhery et al. 2022, §5.

    Where a gradient is wanted it is formed in the forward pass, since with one scalar loss the
    cotangent of the logits is known as soon as their sum is.

    Args:
        hidden: [T, D].
        head: [D, V], in hidden's dtype. For a table [V, D] pass its transpose: no copy is made.
        targets: int [T]. One outside 0..V-1 counts as a logit of 0: give it weight 0.
        weights: fp32 [T]; 0 leaves a token out.
        softcap: logits become softcap · tanh(logits / softcap) (Gemma 2, Riviere et al. 2024, §2).
        chunk: of "xla", tokens whose logits exist at once.
        implementation: "tpu": a Pallas kernel, which keeps logits in VMEM; "xla": any backend,
            [chunk, V] logits in memory; None: "tpu" where the program is compiled for a TPU whose
            VMEM holds its smallest blocks, "xla" elsewhere.
        blocks: of "tpu", its kernels' block sizes; None: as large as VMEM holds.
        interpret: of "tpu", as ``pallas_call`` takes it.

    Returns:
        (loss with the z term, cross-entropy without it), fp32 scalars, sums over tokens. Only the
        first is differentiable, in ``hidden`` and ``head``.

    Raises:
        ValueError: shapes that do not belong together, softcap ≤ 0, chunk < 1, or blocks that
            are no multiples of 128 or that the chip's VMEM does not hold.
    """
    run = partial(
        loss_and_gradients,
        z_loss=z_loss,
        softcap=softcap,
        chunk=chunk,
        implementation=implementation,
        blocks=blocks,
        interpret=interpret,
    )
    return _differentiable(hidden, head, targets, weights, run)


def loss_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    first: jax.Array | int = 0,
    axes: tuple[str, ...] = (),
    gradient: bool = True,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int = 1024,
    implementation: Implementation | None = None,
    blocks: Tiling | None = None,
    interpret: Any = False,
) -> Loss:
    """The sums of :func:`linear_cross_entropy` over this device's tokens, and their gradients; not
    to be differentiated by JAX.

    Inside ``shard_map``, mesh axes may split the vocabulary: ``head`` [D, V / ways] is then this
    device's share, and a few numbers a token cross ``axes``.

    Args: as there; and
        first: the index in the vocabulary of the share's first entry.
        axes: the mesh axes that split the vocabulary.

    Returns:
        The two sums, alike along ``axes``, not yet summed over devices that hold other tokens; and
        (d_hidden [T, D], d_head, as ``head``) of the first sum in their arguments' dtypes, or None.
        Along ``axes`` d_hidden is a term of a sum that the caller takes.
    """
    _check(hidden, head, targets, weights, softcap, chunk)
    share = (hidden, head, targets - first, weights)
    options: dict[str, Any] = {
        "axes": axes,
        "gradient": gradient,
        "z_loss": z_loss,
        "softcap": softcap,
    }
    by_xla = partial(xla.loss_and_gradients, **options, chunk=chunk)
    by_tpu = partial(tpu.loss_and_gradients, **options, blocks=blocks, interpret=interpret)
    if implementation is None and fits(hidden.shape, head.shape[1], hidden.dtype, current_chip()):
        return lax.platform_dependent(*share, tpu=by_tpu, default=by_xla)
    return (by_tpu if implementation == "tpu" else by_xla)(*share)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _differentiable(hidden, head, targets, weights, run):
    return run(hidden, head, targets, weights, gradient=False)[0]


def _forward(hidden, head, targets, weights, run):
    return run(hidden, head, targets, weights)


def _backward(_, gradients, cotangents):
    d_hidden, d_head = (g * cotangents[0].astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None


_differentiable.defvjp(_forward, _backward)


def _check(hidden, head, targets, weights, softcap, chunk):
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
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is above 0; got {softcap}")
    if chunk < 1:
        raise ValueError(f"chunk is at least 1; got {chunk}")
