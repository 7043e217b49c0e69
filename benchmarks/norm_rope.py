"""How much a kernel could gain over XLA's own RMSNorm and RoPE on a TPU.

    python benchmarks/norm_rope.py [CASE ...] [--list] [--chips v5p v6e]

Needs the `tpu` extra, and no TPU. Each case is compiled by the TPU's compiler from this
project's layers, forward and backward apart: the sum of the residual stream and a
layer's output with the norm of it, and the rotation of queries and keys. Columns: bytes
of main memory that the scheduled program moves, beside the least (arguments read once,
results written once); the time of the former at the chip's bandwidth; the time that the
final schedule takes where memory never waits, XLA's and that of a plain Pallas kernel
for the same, which moves the least.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from cases import add_cases, chosen
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from benchmarks.kernel_cycles.static import CHIPS as STATIC
from benchmarks.kernel_cycles.static import Spec, measure
from benchmarks.program_traffic import read_program_traffic
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.rope import Rotary, compute_rotary, rotate
from maxlm.plan.compiled.program import get_topology_devices
from maxlm.plan.hardware import CHIPS
from maxlm.plan.topology import parse_topology

TOKENS, D, HEADS, KV_HEADS, HEAD_DIM = 8192, 4096, 32, 8, 128
EPS, THETA, ROWS = 1e-5, 500_000.0, 128
MB, MICRO = 1e6, 1e-6

Program = tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]


def stream(width: int = D) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((TOKENS, width), jnp.bfloat16)


def heads(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, TOKENS, count, HEAD_DIM), jnp.bfloat16)


SCALE = jax.ShapeDtypeStruct((D,), jnp.float32)
POSITIONS = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
ANGLES = jax.ShapeDtypeStruct((TOKENS, HEAD_DIM), jnp.float32)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    layer: Any = SimpleNamespace(config=NormConfig(eps=EPS), dtype=jnp.bfloat16)
    return Norm._normalise(layer, x, scale, None)


def norm_forward(x, branch, scale):
    x = x + branch
    return x, norm(x, scale)


def norm_backward(x, scale, d_x, d_normed):
    d_own, d_scale = jax.vjp(norm, x, scale)[1](d_normed)
    return d_x + d_own, d_scale


def rope_forward(q, k, positions):
    angles = compute_rotary(positions, HEAD_DIM, THETA)
    return rotate(q, angles), rotate(k, angles)


def rope_backward(d_q, d_k, positions):
    angles = compute_rotary(positions, HEAD_DIM, THETA)
    back = Rotary(angles.cos, -angles.sin)
    return rotate(d_q, back), rotate(d_k, back)


XLA: dict[str, Program] = {
    "norm-forward": (norm_forward, (stream(), stream(), SCALE)),
    "norm-backward": (norm_backward, (stream(), SCALE, stream(), stream())),
    "rope-forward": (rope_forward, (heads(HEADS), heads(KV_HEADS), POSITIONS)),
    "rope-backward": (rope_backward, (heads(HEADS), heads(KV_HEADS), POSITIONS)),
}


def by_rows(kernel, *arguments, widths, dtypes, sums=0):
    """A kernel over blocks of rows; arguments of one row are whole in every step. Of
    the last ``sums`` results each step has 8 rows of its own."""

    def rows(width, height=ROWS):
        return pl.BlockSpec((height, width), lambda i: (i, 0))

    def row(width):
        return pl.BlockSpec((1, width), lambda i: (0, 0))

    steps = TOKENS // ROWS
    heights = [ROWS] * (len(widths) - sums) + [8] * sums
    return pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=[
            row(a.shape[1]) if len(a) == 1 else rows(a.shape[1]) for a in arguments
        ],
        out_specs=[rows(w, h) for w, h in zip(widths, heights, strict=True)],
        out_shape=[
            jax.ShapeDtypeStruct((steps * h, w), t)
            for h, w, t in zip(heights, widths, dtypes, strict=True)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(*arguments)


def pallas_norm_forward(x, branch, scale):
    def kernel(x, branch, scale, total, normed):
        total[...] = x[...] + branch[...]
        wide = total[...].astype(jnp.float32)
        root = jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + EPS)
        normed[...] = (wide * root * scale[...]).astype(normed.dtype)

    return by_rows(
        kernel, x, branch, scale[None], widths=(D, D), dtypes=(jnp.bfloat16,) * 2
    )


def pallas_norm_backward(x, scale, d_x, d_normed):
    def kernel(x, scale, d_x, d_normed, d_total, d_scale):
        wide = x[...].astype(jnp.float32)
        d_wide = d_normed[...].astype(jnp.float32)
        root = jax.lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + EPS)
        unit = wide * root
        d_scale[...] = jnp.sum((d_wide * unit).reshape(-1, 8, D), axis=0)
        d_unit = d_wide * scale[...]
        along = jnp.mean(d_unit * unit, axis=1, keepdims=True)
        d_own = root * (d_unit - unit * along)
        d_total[...] = (d_x[...].astype(jnp.float32) + d_own).astype(d_total.dtype)

    results = by_rows(
        kernel,
        *(x, scale[None], d_x, d_normed),
        widths=(D, D),
        dtypes=(jnp.bfloat16, jnp.float32),
        sums=1,
    )
    return results[0], results[1].sum(axis=0)


def pallas_rope(q, k, cos, sin):
    """``sin`` with its first half negative; the way back has the other half so."""

    def kernel(q, k, cos, sin, *outs):
        for x, out in zip((q, k), outs, strict=True):
            for start in range(0, x.shape[1], HEAD_DIM):
                head = x[:, start : start + HEAD_DIM].astype(jnp.float32)
                turned = head * cos[...] + pltpu.roll(head, HEAD_DIM // 2, 1) * sin[...]
                out[:, start : start + HEAD_DIM] = turned.astype(out.dtype)

    widths = q.shape[1], k.shape[1]
    return by_rows(kernel, q, k, cos, sin, widths=widths, dtypes=(jnp.bfloat16,) * 2)


_ROTATED = stream(HEADS * HEAD_DIM), stream(KV_HEADS * HEAD_DIM), ANGLES, ANGLES
PALLAS: dict[str, Program] = {
    "norm-forward": (pallas_norm_forward, XLA["norm-forward"][1]),
    "norm-backward": (pallas_norm_backward, XLA["norm-backward"][1]),
    "rope-forward": (pallas_rope, _ROTATED),
    "rope-backward": (pallas_rope, _ROTATED),
}


def program(*, case: str, pallas: bool) -> Program:
    """What the counter of cycles compiles, in a process of its own."""
    return (PALLAS if pallas else XLA)[case]


def moved_and_least(case: str, chip: str) -> tuple[int, int]:
    """Bytes of main memory of XLA's program, and the least."""
    function, arguments = XLA[case]
    device = get_topology_devices(parse_topology(STATIC[chip].topology))[0]
    on = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    compiled = (
        jax.jit(function).lower(*(on(a.shape, a.dtype) for a in arguments)).compile()
    )
    ends = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    least = sum(prod(a.shape) * a.dtype.itemsize for a in ends)
    return read_program_traffic(compiled.as_text()).memory_bytes, least


def microseconds(case: str, chip: str, *, pallas: bool) -> float:
    """The schedule's own time, of all kernels one after another."""
    costs = measure(Spec("norm_rope:program", {"case": case, "pallas": pallas}), chip)
    cycles = sum(kernel.cycles for kernel in (*costs.kernels, *costs.others))
    return cycles / costs.chip.clock_hz / MICRO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_cases(parser)
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e"], metavar="CHIP")
    args = parser.parse_args()
    names = chosen(parser, args, XLA)
    os.environ["JAX_PLATFORMS"] = "cpu"
    here = str(Path(__file__).parent)
    above = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, *sys.path, above)))
    print(
        f"{'':<20}{'MB moved':>9}{'least':>8}{'ratio':>7}{'memory':>10}{'XLA':>10}{'Pallas':>10}"
    )
    for chip in args.chips:
        for case in names:
            moved, least = moved_and_least(case, chip)
            times = (
                moved / CHIPS[chip].memory_bandwidth / MICRO,
                microseconds(case, chip, pallas=False),
                microseconds(case, chip, pallas=True),
            )
            print(
                f"{chip + ' ' + case:<20}{moved / MB:>9.1f}{least / MB:>8.1f}{moved / least:>7.3f}"
                + "".join(f"{t:>7.1f} µs" for t in times),
                flush=True,
            )


if __name__ == "__main__":
    main()
