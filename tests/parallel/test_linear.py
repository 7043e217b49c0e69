"""Linear maps on shards: values and gradients in every layout are those of float64
NumPy, and nothing but what the module's table says crosses the wire."""

import re
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from maxlm.parallel.linear import multiply_kernels
from maxlm.parallel.local import Dims, get_layout, make_spec
from maxlm.parallel.operands import DenseOperand
from tests.models.building import QUICK

F, T, C = ("fsdp",), ("tensor",), ("context",)
FC, CT = ("fsdp", "context"), ("context", "tensor")


class LinearCase(NamedTuple):
    """Kernels [6, n] of one x [4, 12, 6]; the mesh axes of every dimension."""

    mesh: dict[str, int]
    x: Dims
    stored: tuple[Dims, ...]
    used: tuple[Dims, ...]
    tokens: Dims
    outputs: tuple[int, ...] = (10, 14)


CASES = {
    "one device": LinearCase(
        {}, ((), (), ()), (((), ()),) * 2, (((), ()),) * 2, ((), ())
    ),
    "fsdp": LinearCase(
        {"fsdp": 2}, (F, (), ()), ((F, ()),) * 2, (((), ()),) * 2, (F, ())
    ),
    "fsdp over outputs": LinearCase(
        {"fsdp": 2}, (F, (), ()), (((), F),) * 2, (((), ()),) * 2, (F, ())
    ),
    "columns": LinearCase(
        {"tensor": 2}, ((), (), ()), (((), T),) * 2, (((), T),) * 2, ((), ())
    ),
    "columns, x split over the sequence": LinearCase(
        {"tensor": 2}, ((), T, ()), (((), T),) * 2, (((), T),) * 2, ((), ())
    ),
    "columns beside a whole one, x split": LinearCase(
        {"tensor": 2}, ((), T, ()), (((), T), ((), ())), (((), T), ((), ())), ((), ())
    ),
    "rows": LinearCase(
        {"tensor": 2}, ((), (), T), ((T, ()),) * 2, ((T, ()),) * 2, ((), ())
    ),
    "rows, y split over the sequence": LinearCase(
        {"tensor": 2}, ((), (), T), ((T, ()),) * 2, ((T, ()),) * 2, ((), T)
    ),
    "columns of everything": LinearCase(
        {"fsdp": 2, "context": 2, "tensor": 2},
        (F, CT, ()),
        ((F, T),) * 2,
        (((), T),) * 2,
        (F, C),
    ),
    "rows of everything": LinearCase(
        {"fsdp": 2, "context": 2, "tensor": 2},
        (F, C, T),
        ((T, F),) * 2,
        ((T, ()),) * 2,
        (F, CT),
    ),
    "stored over batch and sequence": LinearCase(
        {"fsdp": 2, "context": 3}, (F, C, ()), ((FC, ()),) * 2, (((), ()),) * 2, (F, C)
    ),
}


def placed(on: Mesh, array: np.ndarray, dims: Dims) -> jax.Array:
    return jax.device_put(array.astype(np.float32), NamedSharding(on, make_spec(dims)))


def arrays(outputs: tuple[int, ...]):
    draw = np.random.default_rng(0).standard_normal
    x = draw((4, 12, 6))
    return x, [draw((6, n)) for n in outputs], [draw((4, 12, n)) for n in outputs]


def lowered(case: LinearCase, on: Mesh):
    """The lowered (ys, d_x, d_kernels), and its arguments."""
    x, kernels, d_ys = arrays(case.outputs)

    def run(x, kernels, d_ys):
        wholes = (None,) * len(kernels)
        operands = tuple(DenseOperand(used, None) for used in case.used)
        ys, back = jax.vjp(
            lambda x, k: multiply_kernels(
                x,
                tuple({"kernel": kernel} for kernel in k),
                wholes,
                operands,
                case.tokens,
            ),
            x,
            kernels,
        )
        d_x, d_kernels = back(d_ys)
        for got, kernel in zip(d_kernels, kernels, strict=True):
            assert get_layout(got) == get_layout(kernel)
        assert get_layout(d_x) == case.x
        return ys, d_x, d_kernels

    pairs = zip(d_ys, case.used, strict=True)
    arguments = (
        placed(on, x, case.x),
        tuple(placed(on, k, s) for k, s in zip(kernels, case.stored, strict=True)),
        tuple(placed(on, d, (*case.tokens, used[1])) for d, used in pairs),
    )
    with jax.set_mesh(on):
        return jax.jit(run).lower(*arguments), arguments


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_formula(name, mesh):
    case = CASES[name]
    x, kernels, d_ys = arrays(case.outputs)
    program, arguments = lowered(case, mesh(**case.mesh))
    ys, d_x, d_kernels = program.compile(compiler_options=QUICK)(*arguments)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for y, d_kernel, kernel, d_y in zip(ys, d_kernels, kernels, d_ys, strict=True):
        close(y, x @ kernel)
        close(d_kernel, np.tensordot(x, d_y, ([0, 1], [0, 1])))
    close(d_x, sum(d_y @ kernel.T for d_y, kernel in zip(d_ys, kernels, strict=True)))


KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@pytest.mark.parametrize(
    ("name", "axes", "expected"),
    [
        # Whole kernels, 60 and 84 elements, come by all-gather alone; gradients go by
        # halves.
        (
            "fsdp",
            {"fsdp": 2},
            "all-gather 60, all-gather 84, reduce-scatter 30, reduce-scatter 42",
        ),
        # x has 288 elements; of 144 each device has its share of the gradient.
        (
            "columns, x split over the sequence",
            {"tensor": 2},
            "all-gather 288, reduce-scatter 144",
        ),
        ("columns", {"tensor": 2}, "all-reduce 288"),
    ],
)
def test_nothing_else_crosses_the_wire(name, axes, expected, mesh):
    """(kind, elements of a device's result) of all that does."""
    text = (
        lowered(CASES[name], mesh(**axes))[0].compile(compiler_options=QUICK).as_text()
    )
    transfers = {
        f"{kind} {prod(map(int, shape.split(',')))}"
        for result, kind in re.findall(rf" = (.*?) ({KINDS})(?:-start)?\(", text)
        for shape in re.findall(r"f32\[([\d,]+)\]", result)
    }
    assert transfers == set(expected.split(", "))
