"""What a compiled program costs, read from its text: exact FLOPs, bytes and mesh axes, with every
loop's trips; on programs whose costs are known by formula."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.plan.compiled.cost import CompiledCost, read_compiled_cost, read_compiled_memory
from pallas_kernels.attention import attention

ONE = {"data": 1}
M, K, N = 24, 40, 56


def text_of(function, *shapes) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def cost_of(function, *shapes, **options) -> CompiledCost:
    return read_compiled_cost(text_of(function, *shapes), ONE, **options)


def repeated(times: int, body):
    """``body(x) -> x`` run ``times`` times by a scan."""
    return lambda x, *rest: lax.scan(lambda c, _: (body(c, *rest), None), x, None, length=times)[0]


def nested(x, w):
    """15 products [M, K] · [K, K] and 5 · [K, N]."""

    def outer(x, _):
        x = repeated(3, lambda x, w: jnp.sin(x @ w[:, :K]))(x, w)
        return x, x @ w[:, K:]

    return lax.scan(outer, x, None, length=5)


NESTED_FLOPS = 5 * (3 * 2 * M * K * K + 2 * M * K * N)
NESTED_SHAPES = ((M, K), (K, K + N))


def test_products_in_nested_loops_are_counted_as_often_as_they_run():
    cost = cost_of(nested, *NESTED_SHAPES)
    assert cost.matmul_flops == NESTED_FLOPS
    assert cost.attention_flops == 0
    assert cost.unknown_loops == ()
    assert sum(m.count for m in cost.matmuls) == 20


def test_trips_are_read_from_the_condition_where_the_compiler_does_not_say():
    text = text_of(nested, *NESTED_SHAPES)
    without = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert "known_trip_count" in text
    assert "known_trip_count" not in without
    assert read_compiled_cost(without, ONE).matmul_flops == NESTED_FLOPS


@pytest.mark.parametrize(("first", "end", "trips"), [(0, 7, 7), (3, 7, 4), (-2, 7, 9)])
def test_a_counter_may_start_anywhere(first, end, trips):
    def function(x, w):
        return lax.fori_loop(first, end, lambda _, x: jnp.sin(x @ w), x)

    text = text_of(function, (M, K), (K, K))
    without = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    for known in (text, without):
        assert read_compiled_cost(known, ONE).matmul_flops == trips * 2 * M * K * K


@pytest.mark.parametrize(
    ("first", "holds", "move", "trips"),
    [
        (0, lambda i: i < 10, lambda i: i + 3, 4),
        (0, lambda i: i <= 9, lambda i: i + 3, 4),
        (10, lambda i: i > 0, lambda i: i - 2, 5),
        (10, lambda i: i >= 0, lambda i: i - 2, 6),
        (0, lambda i: i != 12, lambda i: i + 4, 3),
        (7, lambda i: i < 7, lambda i: i + 1, 0),
        (1, lambda i: i < 100, lambda i: i * 2, None),
    ],
)
def test_trips_of_other_counters(first, holds, move, trips):
    def function(x, w):
        def body(carry):
            i, x = carry
            return move(i), jnp.sin(x @ w)

        return lax.while_loop(lambda carry: holds(carry[0]), body, (first, x))[1]

    text = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text_of(function, (M, K), (K, K)))
    cost = read_compiled_cost(text, ONE)
    counted = (1 if trips is None else trips) * 2 * M * K * K
    # A loop that never runs may be gone.
    assert cost.matmul_flops == counted
    assert len(cost.unknown_loops) == (trips is None)


def test_a_loop_of_unknown_trips_counts_once_and_is_named():
    def function(x, w):
        return lax.while_loop(lambda x: x.sum() < 1e3, lambda x: jnp.sin(x @ w) + 1, x)

    cost = cost_of(function, (M, K), (K, K))
    assert cost.matmul_flops == 2 * M * K * K
    assert len(cost.unknown_loops) == 1


def test_gradients_of_a_scanned_layer_take_three_times_its_forward_pass():
    def loss(x, w):
        return lax.scan(lambda c, own: (jnp.sin(c @ own), None), x, w)[0].sum()

    cost = cost_of(jax.grad(loss, argnums=(0, 1)), (M, K), (6, K, K))
    assert cost.matmul_flops == 3 * 6 * 2 * M * K * K


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


def test_attention_stands_apart_by_a_predicate_of_ones_own():
    def function(x, w):
        with jax.named_scope("scores"):
            y = jnp.sin(x @ w)
        return y @ w

    cost = cost_of(function, (M, K), (K, K), is_attention=lambda op, files: "scores" in op)
    assert cost.matmul_flops == cost.attention_flops == 2 * M * K * K


def test_stacked_arrays_of_a_loop_are_not_read_whole_in_every_trip():
    """Twice the layers are twice the bytes, not four times."""

    def function(x, w):
        return lax.scan(lambda c, own: (jnp.sin(c * own), c), x, w)

    # Large enough that what does not scale is nothing beside them.
    few, many = (cost_of(function, (K, 512), (n, K, 512)).memory_bytes for n in (8, 32))
    assert many / few == pytest.approx(4, rel=0.15)
    # A layer reads its own slice and the carry, and writes the carry and its slice of the output
    # (and what was not an argument to begin with is copied into the loop, once).
    assert 1 <= few / (8 * 4 * K * 512 * 4) < 2.5


def test_the_largest_arrays_are_named():
    def function(x):
        with jax.named_scope("outer"):
            return jnp.sin(x @ x.T) @ x

    largest = cost_of(function, (512, 64)).arrays[0]
    assert (largest.shape, largest.nbytes) == ("f32[512,512]", 512 * 512 * 4)
    assert "outer" in largest.op_name


def test_memory_is_the_compilers_own():
    compiled = jax.jit(lambda x: (x @ x.T) @ x).lower(jnp.ones((64, 32))).compile()
    memory = read_compiled_memory(compiled)
    assert (memory.argument, memory.output, memory.alias) == (64 * 32 * 4, 64 * 32 * 4, 0)
    assert memory.temp >= 64 * 64 * 4
    assert memory.peak == memory.argument + memory.output + memory.temp


SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
ROWS, COLUMNS = 32, 48
SIZE = ROWS * COLUMNS * 4
RING = [(i, (i + 1) % 2) for i in range(2)]

# name → (on shards [ROWS, COLUMNS], kind, axes, bytes sent by each device in one run)
EXCHANGES = {
    "gather": (partial(lax.all_gather, axis_name="fsdp"), "all-gather", "fsdp", SIZE),
    "gather over two": (
        partial(lax.all_gather, axis_name=("data", "tensor")),
        *("all-gather", "data+tensor", 3 * SIZE),
    ),
    "scatter": (
        partial(lax.psum_scatter, axis_name="tensor", tiled=True),
        *("reduce-scatter", "tensor", SIZE / 2),
    ),
    "scatter over all": (
        partial(lax.psum_scatter, axis_name=tuple(SIZES), tiled=True),
        *("reduce-scatter", "data+fsdp+tensor", SIZE * 7 / 8),
    ),
    "sum": (partial(lax.psum, axis_name="data"), "all-reduce", "data", SIZE),
    "sum over two": (
        partial(lax.psum, axis_name=("data", "fsdp")),
        *("all-reduce", "data+fsdp", 2 * SIZE * 3 / 4),
    ),
    "exchange": (
        partial(lax.all_to_all, axis_name="tensor", split_axis=0, concat_axis=1, tiled=True),
        *("all-to-all", "tensor", SIZE / 2),
    ),
    "rotate": (
        partial(lax.ppermute, axis_name="fsdp", perm=RING),
        *("collective-permute", "fsdp", SIZE),
    ),
    "shift one way": (
        partial(lax.ppermute, axis_name="data", perm=RING[:1]),
        *("collective-permute", "data", SIZE),
    ),
}


@pytest.fixture(scope="module")
def exchanged(mesh):
    axes = mesh(**SIZES)

    def text(function) -> str:
        """The function run five times in a loop, on shards [ROWS, COLUMNS] of all devices."""
        everywhere = P(("data", "fsdp", "tensor"))

        def local(x):
            def body(total, _):
                return total + jnp.sin(function(jnp.cos(x * total))).sum(), None

            return lax.scan(body, x[0, 0], None, length=5)[0][None]

        step = jax.shard_map(
            local, mesh=axes, in_specs=everywhere, out_specs=everywhere, check_vma=False
        )
        shape = (8 * ROWS, COLUMNS)
        sharding = NamedSharding(axes, everywhere)
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        return jax.jit(step).lower(x).compile().as_text()

    return text, dict(axes.shape)


@pytest.mark.parametrize("name", EXCHANGES)
def test_each_collective_has_its_axes_and_bytes(exchanged, name):
    function, kind, axes, size = EXCHANGES[name]
    text, sizes = exchanged
    cost = read_compiled_cost(text(function), sizes)
    (found,) = cost.collectives
    assert (found.kind, found.axes, found.count) == (kind, axes, 5)
    assert found.payload_bytes == SIZE
    assert found.wire_bytes == 5 * size
    assert cost.wire_by_kind_and_axes() == {(kind, axes): 5 * size}
    assert cost.wire_bytes(kind=kind) == cost.wire_bytes(axes=axes) == cost.wire_bytes()
    assert cost.wire_bytes(kind="nothing") == 0
