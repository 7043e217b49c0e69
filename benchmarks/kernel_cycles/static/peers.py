"""Attention kernels of others as programs to measure: jax's splash and flash attention,
tokamax's splash attention where it is installed.

Each program is ``(function, arguments)`` of q, k, v, all [batch, heads, seq, head_dim]
bf16; with ``gradient``, of the three gradients. Peers take segments beside a causal
mask; jax's compute every block that is not above the diagonal, tokamax's skips those
without a common segment.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cycles.static.problems import Mask

Program = tuple[Callable[..., Any], Sequence[Any]]


def _program(
    attend: Callable[..., Any],
    segments: np.ndarray | None,
    gradient: bool,
    shape: tuple[int, int, int, int],
) -> Program:
    """Of ``attend(q, k, v, segment_ids)``, which takes those of one batch row [seq]."""
    operand = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    ids = (
        () if segments is None else (jnp.broadcast_to(segments, (shape[0], shape[2])),)
    )

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        return attend(q, k, v, *ids)

    def gradients(*operands: jax.Array) -> Any:
        q, k, v, do, *ids = operands
        return jax.vjp(lambda q, k, v: attend(q, k, v, *ids), q, k, v)[1](do)

    return (
        (gradients, (operand,) * 4 + ids)
        if gradient
        else (forward, (operand,) * 3 + ids)
    )


def jax_splash(
    *,
    gradient: bool,
    batch: int,
    heads: int,
    seq: int,
    head_dim: int,
    mask: str,
    forward: Sequence[int],
    backward: Sequence[int] = (),
    backward_dq: Sequence[int] = (),
) -> Program:
    """``jax.experimental.pallas.ops.tpu.splash_attention``.

    Args:
        forward: block_q, block_kv, block_kv_compute.
        backward: the same of the kernel for dK and dV; default as forward.
        backward_dq: block_q, block_kv of a kernel for dQ; without, one kernel gives all
            three.
    """
    parsed_mask = Mask.parse(mask)
    attend = jax_splash_attention(
        parsed_mask,
        heads,
        seq,
        forward=forward,
        backward=backward,
        backward_dq=backward_dq,
    )
    return _program(
        attend, parsed_mask.segment_ids(seq), gradient, (batch, heads, seq, head_dim)
    )


def jax_splash_attention(
    mask: Mask,
    heads: int,
    seq: int,
    *,
    forward: Sequence[int],
    backward: Sequence[int] = (),
    backward_dq: Sequence[int] = (),
    residual_checkpoint_name: str | None = None,
) -> Callable[..., jax.Array]:
    """``attend(q, k, v)`` and ``attend(q, k, v, segment_ids)`` of [B, heads, seq,
    head_dim] and [B, seq], scores not scaled; fewer heads of k and v are grouped.

    Args: as :func:`jax_splash`; a remat policy knows what the backward pass wants by
        ``residual_checkpoint_name``.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    q_dkv, kv_dkv, kv_dkv_compute = backward or forward
    sizes = kernel.BlockSizes(
        *forward,
        block_q_dkv=q_dkv,
        block_kv_dkv=kv_dkv,
        block_kv_dkv_compute=kv_dkv_compute,
        block_q_dq=backward_dq[0] if backward_dq else None,
        block_kv_dq=backward_dq[1] if backward_dq else None,
        use_fused_bwd_kernel=not backward_dq,
    )
    splash = kernel.make_splash_mha(
        masks.MultiHeadMask([_splash_mask(masks, mask, seq)] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=residual_checkpoint_name,
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> Any:
        return jax.vmap(
            lambda q, k, v, *i: splash(q, k, v, *(kernel.SegmentIds(x, x) for x in i))
        )(q, k, v, *ids)

    return attend


def tokamax_splash(
    *,
    gradient: bool,
    batch: int,
    heads: int,
    seq: int,
    head_dim: int,
    mask: str,
    forward: Sequence[int],
    backward: Sequence[int] = (),
) -> Program:
    """tokamax's splash attention; blocks as above."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_kernel as kernel,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_mask as masks,
    )

    parsed_mask = Mask.parse(mask)
    q_dkv, kv_dkv, kv_dkv_compute = backward or forward
    config = kernel.SplashConfig(
        *forward,
        block_q_dkv=q_dkv,
        block_kv_dkv=kv_dkv,
        block_kv_dkv_compute=kv_dkv_compute,
    )
    splash = kernel.make_splash_mha(
        _splash_mask(masks, parsed_mask, seq), config=config, q_seq_shards=1
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> Any:
        return jax.vmap(
            lambda q, k, v, *i: splash(q, k, v, *(kernel.SegmentIds(x, x) for x in i))
        )(q, k, v, *ids)

    return _program(
        attend, parsed_mask.segment_ids(seq), gradient, (batch, heads, seq, head_dim)
    )


def _splash_mask(masks: Any, parsed_mask: Mask, seq: int) -> Any:
    if parsed_mask.window:
        return masks.LocalMask(
            (seq, seq), window_size=(parsed_mask.window - 1, 0), offset=0
        )
    return masks.CausalMask((seq, seq))


def jax_flash(
    *,
    gradient: bool,
    batch: int,
    heads: int,
    seq: int,
    head_dim: int,
    mask: str,
    forward: Sequence[int],
    backward: Sequence[int] = (),
    backward_dq: Sequence[int] = (),
) -> Program:
    """``jax.experimental.pallas.ops.tpu.flash_attention``, which has no window.

    Args:
        forward: block_q, block_k_major, block_k.
        backward: block_q_major, block_q, block_k_major, block_k of the kernel for dK
            and dV.
        backward_dq: block_q, block_k_major, block_k of that for dQ.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    parsed_mask = Mask.parse(mask)
    if parsed_mask.window:
        raise ValueError("jax's TPU flash attention has no window")
    q_major, q_minor, k_major, k_minor = backward or (forward[0], *forward)
    q_dq, k_major_dq, k_dq = backward_dq or (q_major, k_major, k_minor)
    sizes = kernel.BlockSizes(
        *forward,
        block_b=1,
        block_q_major_dkv=q_major,
        block_q_dkv=q_minor,
        block_k_major_dkv=k_major,
        block_k_dkv=k_minor,
        block_q_dq=q_dq,
        block_k_major_dq=k_major_dq,
        block_k_dq=k_dq,
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> Any:
        pair = kernel.SegmentIds(*ids, *ids) if ids else None
        return kernel.flash_attention(
            q, k, v, None, pair, causal=True, sm_scale=head_dim**-0.5, block_sizes=sizes
        )

    return _program(
        attend, parsed_mask.segment_ids(seq), gradient, (batch, heads, seq, head_dim)
    )
