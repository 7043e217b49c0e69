"""Attention, forward and backward, beside jax's and tokamax's."""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.static.benchmarks.contest import Benchmark, Contender, Pass
from pallas_kernels.static.measure import Spec
from pallas_kernels.static.problems import Mask, attention_flops


def own_attention(
    *, gradient: bool, batch: int, heads: int, seq: int, head_dim: int, mask: str, **options: Any
) -> tuple[Callable[..., Any], Sequence[Any]]:
    """This package's attention; ``options`` go to it."""
    from pallas_kernels.attention import attention as own

    how = Mask.parse(mask)
    ids = how.segment_ids(seq)
    operand = jax.ShapeDtypeStruct((batch, seq, heads, head_dim), jnp.bfloat16)
    rows = () if ids is None else (jnp.broadcast_to(ids, (batch, seq)),)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        segments = (ids[0], ids[0]) if ids else None
        return own(q, k, v, window=how.window, segment_ids=segments, **options)

    def gradients(*operands: jax.Array) -> Any:
        q, k, v, do, *ids = operands
        return jax.vjp(lambda q, k, v: forward(q, k, v, *ids), q, k, v)[1](do)

    return (gradients, (operand,) * 4 + rows) if gradient else (forward, (operand,) * 3 + rows)


# Block sizes at which each peer was fastest on a v5p or a v6e, of those tried (128 to 2,048): the
# large ones causal, the last where a window, segments or a short sequence leave small blocks.
SPLASH_FORWARD = ((1024, 1024, 256), (1024, 1024, 512), (512, 512, 512))
SPLASH_BACKWARD = (((1024, 1024, 512),), ((1024, 1024, 1024),), ((512, 512, 512),))
_FLASH_FORWARD = ((1024, 1024, 1024), (512, 512, 512))
_FLASH_BACKWARD = (
    ((1024, 512, 1024, 1024), (1024, 1024, 512)),
    ((512, 512, 512, 512), (512, 512, 512)),
)


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

    def fits(blocks: Sequence[int]) -> bool:
        return all(options.seq % block == 0 for block in blocks)

    def contender(name: str, function: str, forwards: Any, backwards: Any) -> Contender:
        where = f"pallas_kernels.static.peers:{function}"
        forward = [{"forward": blocks} for blocks in forwards if fits(blocks)]
        backward = [
            dict(zip(("backward", "backward_dq"), blocks, strict=False)) | forward[0]
            for blocks in backwards
            if forward and all(map(fits, blocks))
        ]
        return Contender(
            name,
            {
                "forward": [Spec(where, problem | {"gradient": False} | b) for b in forward],
                "backward": [Spec(where, problem | {"gradient": True} | b) for b in backward],
            },
            peer=True,
        )

    where = f"{__name__}:own_attention"
    contenders = [
        Contender(
            "pallas_kernels",
            {
                "forward": [Spec(where, problem | {"gradient": False})],
                "backward": [Spec(where, problem | {"gradient": True})],
            },
        )
    ]
    if options.peers:
        contenders.append(contender("jax splash", "jax_splash", SPLASH_FORWARD, SPLASH_BACKWARD))
        if not mask.window:
            contenders.append(contender("jax flash", "jax_flash", _FLASH_FORWARD, _FLASH_BACKWARD))
        if importlib.util.find_spec("tokamax"):
            contenders.append(
                contender("tokamax splash", "tokamax_splash", SPLASH_FORWARD, SPLASH_BACKWARD)
            )
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
