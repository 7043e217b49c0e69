"""What a compiled program costs, read from its text: exact FLOPs, bytes and mesh axes,
with every loop's trips; on programs whose costs are known by formula."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.program_traffic import read_program_traffic
from maxlm.plan.compiled.cost import CompiledCost, read_compiled_cost
from pallas_kernels.attention import attention

ONE = {"data": 1}
M, K, N = 24, 40, 56


def text_of(function, *shapes) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def cost_of(function, *shapes) -> CompiledCost:
    return read_compiled_cost(text_of(function, *shapes), ONE)


def without_trips(text: str) -> str:
    """A TPU's compiler does not state them."""
    return re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)


def repeated(times: int, body):
    """``body(x) -> x`` run ``times`` times by a scan."""
    return lambda x, *rest: lax.scan(
        lambda c, _: (body(c, *rest), None), x, None, length=times
    )[0]


def test_products_in_nested_loops_are_counted_as_often_as_they_run():
    def nested(x, w):
        """15 products [M, K] · [K, K] and 5 · [K, N]."""

        def outer(x, _):
            x = repeated(3, lambda x, w: jnp.sin(x @ w[:, :K]))(x, w)
            return x, x @ w[:, K:]

        return lax.scan(outer, x, None, length=5)

    text = text_of(nested, (M, K), (K, K + N))
    assert "known_trip_count" in text
    for known in (text, without_trips(text)):
        cost = read_compiled_cost(known, ONE)
        assert cost.matmul_flops == 5 * (3 * 2 * M * K * K + 2 * M * K * N)
        assert (cost.attention_flops, cost.unknown_loops) == (0, ())


@pytest.mark.parametrize(
    ("first", "end", "move", "trips"),
    [
        (3, 7, lambda i: i + 1, 4),
        (-2, 7, lambda i: i + 1, 9),
        (0, 10, lambda i: i + 3, 4),
        (7, 7, lambda i: i + 1, 0),
        (1, 100, lambda i: i * 2, None),
    ],
)
def test_trips_are_read_from_the_condition_where_the_compiler_does_not_say(
    first, end, move, trips
):
    def function(x, w):
        def body(carry):
            return move(carry[0]), jnp.sin(carry[1] @ w)

        return lax.while_loop(lambda carry: carry[0] < end, body, (first, x))[1]

    cost = read_compiled_cost(without_trips(text_of(function, (M, K), (K, K))), ONE)
    # One of unknown trips counts once.
    assert cost.matmul_flops == (1 if trips is None else trips) * 2 * M * K * K
    assert len(cost.unknown_loops) == (trips is None)


def test_of_a_conditionals_branches_the_costliest_counts():
    def function(x, w, which):
        branches = [lambda x: x, lambda x: jnp.sin(jnp.sin(x @ w) @ w), lambda x: x @ w]
        return repeated(4, lambda x: lax.switch(which.astype(int)[0], branches, x))(x)

    cost = cost_of(function, (M, K), (K, K), (1,))
    assert cost.matmul_flops == 4 * 2 * 2 * M * K * K


def test_attention_stands_apart_by_the_file_it_was_traced_in():
    B, S, H, D = 2, 256, 3, 16

    def function(x, w):
        q = (x.reshape(-1, D) @ w).reshape(B, S, H, D)
        return attention(q, q, q, causal=False)

    cost = cost_of(function, (B, S, H, D), (D, D))
    assert cost.matmul_flops == 2 * B * S * H * D * D
    assert cost.attention_flops == 2 * 2 * B * H * S * S * D


def test_stacked_arrays_of_a_loop_are_not_read_whole_in_every_trip():
    """Four times the layers are four times the bytes, not sixteen."""

    def function(x, w):
        return lax.scan(lambda c, own: (jnp.sin(c * own), c), x, w)

    # Large enough that what does not scale is nothing beside them.
    texts = (text_of(function, (K, 512), (n, K, 512)) for n in (8, 32))
    few, many = (read_program_traffic(text, ()).memory_bytes for text in texts)
    assert many / few == pytest.approx(4, rel=0.15)
    # A layer reads its own slice and the carry, and writes the carry and its slice of
    # the output (and what was not an argument to begin with is copied into the loop,
    # once).
    assert 1 <= few / (8 * 4 * K * 512 * 4) < 2.5


SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
ROWS, COLUMNS = 32, 48
SIZE = ROWS * COLUMNS * 4

# (on shards [ROWS, COLUMNS], kind, axes, bytes sent by each device in one run)
TILED = {"split_axis": 0, "concat_axis": 1, "tiled": True}
EXCHANGES = (
    (lax.all_gather, {}, "all-gather", "fsdp", SIZE),
    (lax.all_gather, {}, "all-gather", "data+tensor", 3 * SIZE),
    (
        lax.psum_scatter,
        {"tiled": True},
        "reduce-scatter",
        "data+fsdp+tensor",
        SIZE * 7 / 8,
    ),
    (lax.psum, {}, "all-reduce", "data+fsdp", 2 * SIZE * 3 / 4),
    (lax.all_to_all, TILED, "all-to-all", "tensor", SIZE / 2),
    (lax.ppermute, {"perm": [(0, 1)]}, "collective-permute", "data", SIZE),
)


@pytest.mark.parametrize(("function", "options", "kind", "axes", "size"), EXCHANGES)
def test_each_collective_has_its_axes_and_bytes(
    mesh, function, options, kind, axes, size
):
    """Run five times in a loop, on shards of all devices."""
    devices = mesh(**SIZES)
    everywhere = P(tuple(SIZES))
    exchange = partial(function, axis_name=tuple(axes.split("+")), **options)

    def local(x):
        def body(total, _):
            return total + jnp.sin(exchange(jnp.cos(x * total))).sum(), None

        return lax.scan(body, x[0, 0], None, length=5)[0][None]

    step = jax.shard_map(
        local, mesh=devices, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    sharding = NamedSharding(devices, everywhere)
    x = jax.ShapeDtypeStruct((8 * ROWS, COLUMNS), jnp.float32, sharding=sharding)
    text = jax.jit(step).lower(x).compile().as_text()
    cost = read_compiled_cost(text, dict(devices.shape))
    (found,) = cost.collectives
    assert (found.kind, found.axes, found.count) == (kind, axes, 5)
    assert (found.payload_bytes, found.wire_bytes) == (SIZE, 5 * size)
    assert cost.wire_by_kind_and_axes() == {(kind, axes): 5 * size}
    assert cost.wire_bytes(kind=kind) == cost.wire_bytes(axes=axes) == cost.wire_bytes()
    assert cost.wire_bytes(kind="nothing") == 0
