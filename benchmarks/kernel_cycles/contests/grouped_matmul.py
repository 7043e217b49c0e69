"""The grouped matmul and its two gradients, beside jax's megablox (Gale et al.
2022)."""

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cycles.contests.contest import OWN, Benchmark, Contender, Pass
from benchmarks.kernel_cycles.static.measure import Spec

Program = tuple[Callable[..., Any], Sequence[Any]]

# Tiles of rows, contracted dimension and columns (of tgmm: rows, D, F): of those that
# fit the VMEM which the compiler gives a kernel that asks for none, large ones with the
# fewest passes over D.
_TILINGS = {
    "forward": ((256, 4096, 512), (128, 4096, 512)),
    "d_rows": ((256, 3584, 512), (128, 3584, 512)),
    "d_kernels": ((256, 1024, 1024), (512, 1024, 1024)),
}
# Of the Dirichlet distribution of the groups' shares: sizes differ by a factor of two
# or three.
_CONCENTRATION = 16.0


def group_sizes(rows: int, groups: int) -> np.ndarray:
    """int32 [groups], whose sum is ``rows``: shares drawn from a Dirichlet
    distribution, seed 0."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(groups, _CONCENTRATION))
    return rng.multinomial(rows, shares).astype(np.int32)


def _operands(which: str, rows: int, groups: int, d: int, f: int) -> list[Any]:
    """Of ``which`` pass, bf16 but for the sizes: [R, D] and [G, D, F]; the result's
    gradient [R, F] and [G, D, F]; [R, D] and [R, F]."""
    x, y, kernels = (rows, d), (rows, f), (groups, d, f)
    pair = {"forward": (x, kernels), "d_rows": (y, kernels), "d_kernels": (x, y)}[which]
    return [
        *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in pair),
        group_sizes(rows, groups),
    ]


def own(*, which: str, **sizes: int) -> Program:
    """This package's."""
    from pallas_kernels.grouped_matmul import grouped_matmul, grouped_outer_product

    def run(left: jax.Array, right: jax.Array, sizes: jax.Array) -> jax.Array:
        if which == "d_kernels":
            return grouped_outer_product(left, right, sizes)
        return grouped_matmul(left, right, sizes, transpose_kernels=which == "d_rows")

    return run, _operands(which, **sizes)


def megablox(*, which: str, tiling: Sequence[int], **sizes: int) -> Program:
    """``jax.experimental.pallas.ops.tpu.megablox``; the turning of its rows before
    ``tgmm`` is not its kernel's, and so not counted."""
    # The package's attribute of this name is a function.
    kernels = import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

    def run(left: jax.Array, right: jax.Array, sizes: jax.Array) -> jax.Array:
        if which == "d_kernels":
            return kernels.tgmm(left.T, right, sizes, jnp.bfloat16, tuple(tiling))
        transposed = which == "d_rows"
        return kernels.gmm(
            left, right, sizes, jnp.bfloat16, tuple(tiling), transpose_rhs=transposed
        )

    return run, _operands(which, **sizes)


def grouped_matmul(options: argparse.Namespace) -> Benchmark:
    rows, groups, d, f = options.rows, options.groups, options.d, options.f
    problem = {"rows": rows, "groups": groups, "d": d, "f": f}

    def tilings(which: str) -> list[tuple[int, ...]]:
        """Those whose tiles of rows divide them, no larger than the problem."""
        inner, columns = {"forward": (d, f), "d_rows": (f, d), "d_kernels": (d, f)}[
            which
        ]
        return [
            (tile, min(inner, own_inner), min(columns, own_columns))
            for tile, own_inner, own_columns in _TILINGS[which]
            if rows % tile == 0
        ]

    programs = {w: [Spec(f"{__name__}:own", problem | {"which": w})] for w in _TILINGS}
    contenders = [Contender(OWN, programs)]
    if options.peers:
        programs = {
            which: [
                Spec(
                    f"{__name__}:megablox", problem | {"which": which, "tiling": tiling}
                )
                for tiling in tilings(which)
            ]
            for which in _TILINGS
        }
        contenders.append(Contender("jax megablox", programs, peer=True))
    drawn = group_sizes(rows, groups)
    title = (
        f"grouped_matmul, rows {rows}, groups {groups} of {drawn.min()} to "
        f"{drawn.max()}, "
        f"kernels {d} × {f}, bf16"
    )
    passes = [Pass(which, 2 * rows * d * f, blocks=("tiling",)) for which in _TILINGS]
    return Benchmark(title, contenders, passes)
