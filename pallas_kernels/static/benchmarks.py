"""What ``python -m pallas_kernels.bench`` compares: for each kind of kernel, who contends.

To add a kind: a function of the command's options that returns a :class:`Benchmark`, and its name
in ``BENCHMARKS``. A program is a function that returns (callable, arguments), see :class:`Spec`;
how often its kernels' parts run is found from the program itself.
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.static.measure import Spec
from pallas_kernels.static.problems import Mask, attention_flops


@dataclass(frozen=True)
class Contender:
    """A kernel, with the programs among which the fastest counts (block sizes)."""

    name: str
    forward: Sequence[Spec]
    gradient: Sequence[Spec]
    """Forward and backward; the backward's cycles are those of the kernels that differentiation
    made."""
    peer: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Contenders for one problem."""

    title: str
    contenders: Sequence[Contender]
    forward_flops: int
    """That the problem needs."""
    backward_flops: int


def own_attention(
    *, gradient: bool, batch: int, heads: int, seq: int, head_dim: int, mask: str, **options: Any
) -> tuple[Callable[..., Any], Sequence[Any]]:
    """This package's attention; ``options`` go to it."""
    from pallas_kernels.attention import attention

    how = Mask.parse(mask)
    ids = how.segment_ids(seq)
    operand = jax.ShapeDtypeStruct((batch, seq, heads, head_dim), jnp.bfloat16)
    rows = () if ids is None else (jnp.broadcast_to(ids, (batch, seq)),)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        segments = (ids[0], ids[0]) if ids else None
        return attention(q, k, v, window=how.window, segment_ids=segments, **options)

    def gradients(*operands: jax.Array) -> Any:
        q, k, v, do, *ids = operands
        return jax.vjp(lambda q, k, v: forward(q, k, v, *ids), q, k, v)[1](do)

    return (gradients, (operand,) * 4 + rows) if gradient else (forward, (operand,) * 3 + rows)


# Block sizes at which each peer was fastest on a v5p or a v6e, of those tried (128 to 2,048): the
# large ones causal, the last where a window, segments or a short sequence leave small blocks.
_SPLASH_FORWARD = ((1024, 1024, 256), (1024, 1024, 512), (512, 512, 512))
_SPLASH_BACKWARD = (((1024, 1024, 512),), ((1024, 1024, 1024),), ((512, 512, 512),))
_FLASH_FORWARD = ((1024, 1024, 1024), (512, 512, 512))
_FLASH_BACKWARD = (
    ((1024, 512, 1024, 1024), (1024, 1024, 512)),
    ((512, 512, 512, 512), (512, 512, 512)),
)


def _attention(options: argparse.Namespace) -> Benchmark:
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
            [Spec(where, problem | {"gradient": False} | blocks) for blocks in forward],
            [Spec(where, problem | {"gradient": True} | blocks) for blocks in backward],
            peer=True,
        )

    where = f"{__name__}:own_attention"
    contenders = [
        Contender(
            "pallas_kernels",
            [Spec(where, problem | {"gradient": False})],
            [Spec(where, problem | {"gradient": True})],
        )
    ]
    if options.peers:
        contenders.append(contender("jax splash", "jax_splash", _SPLASH_FORWARD, _SPLASH_BACKWARD))
        if not mask.window:
            contenders.append(contender("jax flash", "jax_flash", _FLASH_FORWARD, _FLASH_BACKWARD))
        if importlib.util.find_spec("tokamax"):
            contenders.append(
                contender("tokamax splash", "tokamax_splash", _SPLASH_FORWARD, _SPLASH_BACKWARD)
            )
    title = (
        f"attention, batch {options.batch}, heads {options.heads}, seq {options.seq}, "
        f"head_dim {options.head_dim}, {mask}, bf16"
    )
    forward, backward = attention_flops(
        mask, options.batch, options.heads, options.seq, options.head_dim
    )
    return Benchmark(title, contenders, forward, backward)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Benchmark]] = {"attention": _attention}
