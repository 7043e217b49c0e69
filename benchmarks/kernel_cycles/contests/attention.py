"""Attention, forward and backward, beside jax's and tokamax's."""

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernel_cycles.contests.blocks import PEERS, tried
from benchmarks.kernel_cycles.contests.contest import OWN, Benchmark, Contender, Pass
from benchmarks.kernel_cycles.static.measure import Spec
from benchmarks.kernel_cycles.static.problems import Mask, attention_flops

_TOKAMAX = "tokamax splash"


def own_attention(
    *,
    gradient: bool,
    batch: int,
    heads: int,
    seq: int,
    head_dim: int,
    mask: str,
) -> tuple[Callable[..., Any], Sequence[Any]]:
    """This package's attention."""
    from pallas_kernels.attention import attention as own

    parsed_mask = Mask.parse(mask)
    ids = parsed_mask.segment_ids(seq)
    operand = jax.ShapeDtypeStruct((batch, seq, heads, head_dim), jnp.bfloat16)
    rows = () if ids is None else (jnp.broadcast_to(ids, (batch, seq)),)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        segments = (ids[0], ids[0]) if ids else None
        return own(q, k, v, window=parsed_mask.window, segment_ids=segments)

    def gradients(*operands: jax.Array) -> Any:
        q, k, v, do, *ids = operands
        return jax.vjp(lambda q, k, v: forward(q, k, v, *ids), q, k, v)[1](do)

    if gradient:
        return gradients, (operand,) * 4 + rows
    return forward, (operand,) * 3 + rows


def attention(options: argparse.Namespace) -> Benchmark:
    mask = Mask.parse(options.mask)
    mask.segment_ids(options.seq)
    problem = {
        "batch": options.batch,
        "heads": options.heads,
        "seq": options.seq,
        "head_dim": options.head_dim,
        "mask": options.mask,
    }
    where = f"{__name__}:own_attention"
    contenders = [
        Contender(
            OWN,
            {
                "forward": [Spec(where, problem | {"gradient": False})],
                "backward": [Spec(where, problem | {"gradient": True})],
            },
        )
    ]
    if options.peers:
        contenders += [_peer(name, mask, problem) for name in _peers(mask)]
    title = (
        f"attention, batch {options.batch}, heads {options.heads}, seq {options.seq}, "
        f"head_dim {options.head_dim}, {mask}, bf16"
    )
    forward, backward = attention_flops(
        mask, options.batch, options.heads, options.seq, options.head_dim
    )
    # The backward's programs hold the forward, which its row leaves out.
    passes = [
        Pass("forward", forward, False, ("forward",)),
        Pass("backward", backward, True, ("backward", "backward_dq")),
    ]
    return Benchmark(title, contenders, passes)


def _peers(mask: Mask) -> list[str]:
    """That contend. jax's compute segments' every block under the diagonal, so that
    they take as long as causal: beside tokamax's, which skips what segments part, they
    need no compiler."""
    tokamax = find_spec("tokamax") is not None
    if mask.segments and tokamax:
        return [_TOKAMAX]
    return [
        name
        for name in PEERS
        if (tokamax or name != _TOKAMAX) and not (mask.window and name == "jax flash")
    ]


def _peer(name: str, mask: Mask, problem: dict[str, Any]) -> Contender:
    seq = problem["seq"]
    where = f"benchmarks.kernel_cycles.static.peers:{name.replace(' ', '_')}"
    segment = seq // (mask.segments or 1) if name == _TOKAMAX else seq
    block_sizes = tried(name, mask.window or segment, seq)
    forward = [{"forward": blocks} for blocks in block_sizes.forward]
    backward = [
        dict(zip(("backward", "backward_dq"), kernels, strict=False)) | forward[0]
        for kernels in block_sizes.backward
    ]
    return Contender(
        name,
        {
            "forward": [
                Spec(where, problem | {"gradient": False} | b) for b in forward
            ],
            "backward": [
                Spec(where, problem | {"gradient": True} | b) for b in backward
            ],
        },
        peer=True,
    )
