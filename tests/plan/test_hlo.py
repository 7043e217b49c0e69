"""What a compiled program costs, read from its text: exact FLOPs, bytes and mesh axes, with every
loop's trips; on programs whose costs are known by formula."""

import re
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.plan.compiled_cost import CompiledCost, compiled_cost, compiled_memory, ring_bytes
from maxlm.plan.hlo import parse
from maxlm.plan.hlo_groups import replica_groups
from pallas_kernels.attention import attention

ONE = {"data": 1}
M, K, N = 24, 40, 56


def text_of(function, *shapes) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def cost_of(function, *shapes, **options) -> CompiledCost:
    return compiled_cost(text_of(function, *shapes), ONE, **options)


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
    assert compiled_cost(without, ONE).matmul_flops == NESTED_FLOPS


@pytest.mark.parametrize(("first", "end", "trips"), [(0, 7, 7), (3, 7, 4), (-2, 7, 9)])
def test_a_counter_may_start_anywhere(first, end, trips):
    def function(x, w):
        return lax.fori_loop(first, end, lambda _, x: jnp.sin(x @ w), x)

    text = text_of(function, (M, K), (K, K))
    without = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    for known in (text, without):
        assert compiled_cost(known, ONE).matmul_flops == trips * 2 * M * K * K


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
    cost = compiled_cost(text, ONE)
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


def test_memory_is_the_compilers_own():
    compiled = jax.jit(lambda x: (x @ x.T) @ x).lower(jnp.ones((64, 32))).compile()
    memory = compiled_memory(compiled)
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
    cost = compiled_cost(text(function), sizes)
    (found,) = cost.collectives
    assert (found.kind, found.axes, found.count) == (kind, axes, 5)
    assert found.payload_bytes == SIZE
    assert found.wire_bytes == 5 * size
    assert cost.wire_by_kind_and_axes() == {(kind, axes): 5 * size}
    assert cost.wire_bytes(kind=kind) == cost.wire_bytes(axes=axes) == cost.wire_bytes()
    assert cost.wire_bytes(kind="nothing") == 0


def test_variadic_collectives_sum_their_parts():
    text = module(
        """
  %a = f32[8]{0} parameter(0)
  %b = bf16[16]{0} parameter(1)
  ROOT %sums = (f32[8]{0}, /*index=1*/bf16[16]{0}) all-reduce(%a, %b), channel_id=1, \
replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%add
"""
    )
    (found,) = compiled_cost(text, {"data": 2, "tensor": 2}).collectives
    assert (found.axes, found.payload_bytes, found.wire_bytes) == ("tensor", 64, 64)


def test_a_start_and_its_done_are_one_collective():
    text = module(
        """
  %x = bf16[64,32]{1,0} parameter(0)
  %start = (bf16[64,32]{1,0}, bf16[256,32]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true
  %done = bf16[256,32]{1,0} all-gather-done(%start)
  %send = ((bf16[256,32]{1,0}), bf16[64,32]{1,0}, u32[]) async-start(%done), calls=%wrapped
  ROOT %sent = bf16[64,32]{1,0} async-done(%send), calls=%wrapped
""",
        """
%wrapped (p: bf16[256,32]) -> bf16[64,32] {
  %p = bf16[256,32]{1,0} parameter(0)
  ROOT %scatter = bf16[64,32]{1,0} reduce-scatter(%p), channel_id=2, replica_groups=[2,4]<=[8], \
dimensions={0}, use_global_device_ids=true, to_apply=%add
}
""",
    )
    cost = compiled_cost(text, {"data": 2, "fsdp": 4})
    shard = 64 * 32 * 2
    assert cost.wire_by_kind_and_axes() == {
        ("all-gather", "fsdp"): 3 * shard,
        ("reduce-scatter", "fsdp"): 3 * shard,
    }
    assert [c.count for c in cost.collectives] == [1, 1]


def module(entry: str, others: str = "") -> str:
    return f"""HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}
{others}
ENTRY %main (x: f32[]) -> f32[] {{{entry}}}
"""


def test_an_all_reduce_whose_fusion_keeps_a_slice_is_a_reduce_scatter():
    """XLA:TPU's way of writing one; its rows are padded."""
    text = module(
        """
  %x = bf16[1024,64]{1,0:T(8,128)(2,1)} parameter(0)
  %n = u32[] partition-id()
  %part = bf16[128,64]{1,0:T(8,128)(2,1)} fusion(%x, %n), kind=kCustom, calls=%all-reduce-scatter
  %whole = bf16[1024,64]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=2, \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0'}, use_global_device_ids=true, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %cut = bf16[128,64]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={128,64}
""",
        """
%all-reduce-scatter (p: bf16[1024,64], n: u32[]) -> bf16[128,64] {
  %p = bf16[1024,64]{1,0} parameter(0)
  %n = u32[] parameter(1)
  %zero = bf16[] constant(0)
  %padded = bf16[1152,64]{1,0} pad(%p, %zero), padding=0_128x0_0
  %sums = bf16[1152,64]{1,0} all-reduce(%padded), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, use_global_device_ids=true, to_apply=%add
  %first = s32[] constant(0)
  ROOT %own = bf16[128,64]{1,0} dynamic-slice(%sums, %first, %first), dynamic_slice_sizes={128,64}
}
""",
    )
    cost = compiled_cost(text, {"data": 2, "fsdp": 8})
    assert cost.wire_by_kind_and_axes() == {
        ("all-reduce", "data"): 1024 * 64 * 2,
        ("reduce-scatter", "fsdp"): 1152 * 64 * 2 * 7 // 8,
    }


def test_a_collective_spread_under_several_fusions_is_one():
    """XLA:TPU prints it where it starts, in each computation that it runs under, and where it
    ends; the bytes in flight are counted once too."""
    started = "(bf16[16,64]{1,0}, bf16[128,64]{1,0}, u32[]{:S(2)})"
    gather = """channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, \
use_global_device_ids=true"""
    text = module(
        f"""
  %x = bf16[16,64]{{1,0}} parameter(0)
  %y = bf16[32,32]{{1,0}} parameter(1)
  %s = {started} fusion(%x), kind=kCustom, calls=%starts
  %s0 = bf16[16,64]{{1,0}} get-tuple-element(%s), index=0
  %s1 = bf16[128,64]{{1,0}} get-tuple-element(%s), index=1
  %s2 = u32[]{{:S(2)}} get-tuple-element(%s), index=2
  %m = (bf16[32,32]{{1,0}}, bf16[16,64]{{1,0}}, bf16[128,64]{{1,0}}, u32[]{{:S(2)}}) \
fusion(%s0, %s1, %s2, %y), kind=kOutput, calls=%under
  %m0 = bf16[32,32]{{1,0}} get-tuple-element(%m), index=0
  %m1 = bf16[16,64]{{1,0}} get-tuple-element(%m), index=1
  %m2 = bf16[128,64]{{1,0}} get-tuple-element(%m), index=2
  %m3 = u32[]{{:S(2)}} get-tuple-element(%m), index=3
  ROOT %e = bf16[128,64]{{1,0}} fusion(%m1, %m2, %m3), kind=kCustom, calls=%ends
""",
        f"""
%starts (p: bf16[16,64]) -> (bf16[16,64], bf16[128,64], u32[]) {{
  %p = bf16[16,64]{{1,0}} parameter(0)
  %g = bf16[128,64]{{1,0}} all-gather(%p), {gather}
  ROOT %c = {started} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%under (p: bf16[16,64], q: bf16[128,64], r: u32[], y: bf16[32,32]) -> (bf16[32,32], bf16[16,64], \
bf16[128,64], u32[]) {{
  %p = bf16[16,64]{{1,0}} parameter(0)
  %q = bf16[128,64]{{1,0}} parameter(1)
  %r = u32[]{{:S(2)}} parameter(2)
  %y = bf16[32,32]{{1,0}} parameter(3)
  %d = bf16[32,32]{{1,0}} dot(%y, %y), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %g = bf16[128,64]{{1,0}} all-gather(%p), {gather}
  ROOT %t = (bf16[32,32]{{1,0}}, bf16[16,64]{{1,0}}, bf16[128,64]{{1,0}}, u32[]) \
tuple(%d, %p, %g, %r)
}}

%ends (p: bf16[16,64], q: bf16[128,64], r: u32[]) -> bf16[128,64] {{
  %p = bf16[16,64]{{1,0}} parameter(0)
  %q = bf16[128,64]{{1,0}} parameter(1)
  %g = bf16[128,64]{{1,0}} all-gather(%p), {gather}
  %r = u32[]{{:S(2)}} parameter(2)
  ROOT %c = bf16[128,64]{{1,0}} custom-call(%p, %q, %g, %r), \
custom_call_target="AsyncCollectiveDone"
}}
""",
    )
    cost = compiled_cost(text, {"fsdp": 8}, on_chip=(1, 2))
    (found,) = cost.collectives
    assert (found.count, found.wire_bytes) == (1, 7 * 16 * 64 * 2)
    assert cost.custom_calls == ()
    started_bytes, under = (16 + 16 + 128) * 64 * 2, 2 * 32 * 32 * 2
    assert cost.memory_bytes == started_bytes + under


# window and labels, lhs, rhs, result, 2·M·N·K
CONVOLUTIONS = {
    "a plain product": (
        *("window={size=1}, dim_labels=0bf_io0->0bf", (4, 16, 32), (32, 24, 1), (4, 16, 24)),
        2 * 4 * 16 * 32 * 24,
    ),
    "heads as a padded window": (
        "window={size=1x6 pad=0_0x5_5 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
        *((4, 16, 32, 1), (32, 6, 8, 1), (4, 16, 6, 8)),
        2 * 4 * 16 * 32 * 6 * 8,
    ),
    "rows and heads as a dilated batch": (
        "window={size=4x6 stride=3x5 lhs_dilate=4x6}, dim_labels=01bf_01oi->01bf",
        *((4, 6, 16, 8), (4, 6, 24, 8), (4, 6, 16, 24)),
        2 * 4 * 6 * 16 * 24 * 8,
    ),
    "rows contracted by the window": (
        *("window={size=4}, dim_labels=0fb_0io->bf0", (4, 16, 32), (4, 16, 24), (32, 24, 1)),
        2 * 4 * 16 * 32 * 24,
    ),
    "groups of features": (
        "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f, feature_group_count=4",
        *((2, 10, 8), (3, 2, 12), (2, 10, 12)),
        2 * 2 * (10 * 3 - 2) * 2 * 12,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_products_written_as_convolutions_count_what_meets_the_input(name):
    attributes, lhs, rhs, result, flops = CONVOLUTIONS[name]

    def of(shape):
        return f"bf16[{','.join(map(str, shape))}]"

    text = module(
        f"""
  %x = {of(lhs)} parameter(0)
  %w = {of(rhs)} parameter(1)
  ROOT %y = {of(result)} convolution(%x, %w), {attributes}
"""
    )
    assert compiled_cost(text, ONE).matmul_flops == flops


def test_calls_of_matrix_libraries_and_custom_kernels():
    text = module(
        """
  %x = bf16[16,32]{1,0} parameter(0)
  %w = bf16[32,24]{1,0} parameter(1)
  %y = (bf16[16,24]{1,0}, s8[1024]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  %k = bf16[16,32]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/splash"}, backend_config={"custom_call_config":{"body":"AA==",\
"cost_estimate":{"flops":"1234","transcendentals":"0"}}}
  ROOT %b = bf16[16,32]{1,0} custom-call(), custom_call_target="AllocateBuffer"
"""
    )
    cost = compiled_cost(text, ONE)
    assert cost.matmul_flops == 2 * 16 * 32 * 24
    (kernel,) = cost.custom_calls
    assert (kernel.target, kernel.op_name, kernel.flops) == (
        "tpu_custom_call",
        "jit(f)/splash",
        1234,
    )


GROUPS = {
    "{{0,1},{2,3}}": [[0, 1], [2, 3]],
    "{}": [list(range(8))],
    "[1,8]<=[8]": [list(range(8))],
    "[2,4]<=[8]": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "[2,4]<=[4,2]T(1,0)": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "[4,2]<=[2,2,2]T(2,0,1)": [[0, 2], [4, 6], [1, 3], [5, 7]],
    "mesh['axis_0'=8] {'axis_0'}": [list(range(8))],
    "mesh['data'=2,'fsdp'=4] {'fsdp'}": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "mesh['data'=2,'fsdp'=4] {'data'}": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "mesh['a'=2,'b'=2,'c'=2] {'c','a'}": [[0, 4, 1, 5], [2, 6, 3, 7]],
    "mesh['a'=8] {'a':(2)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "mesh['a'=8] {'a':(1)2}": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}": None,
}


@pytest.mark.parametrize("form", [form for form, groups in GROUPS.items() if groups])
def test_replica_groups_in_every_printed_form(form):
    assert replica_groups(f"replica_groups={form}, dimensions={{0}}", 8) == GROUPS[form]


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups("replica_groups=<something new>", 8)
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("something else\n")


def test_what_a_ring_sends():
    assert ring_bytes("all-gather", 4, 10) == 30
    assert ring_bytes("reduce-scatter", 4, 40) == 30
    assert ring_bytes("all-reduce", 4, 40) == 60
    assert ring_bytes("all-reduce", 1, 40) == 0


def test_the_tpu_compilers_text_is_read_too():
    pytest.importorskip("libtpu")
    from maxlm.plan.topology import parse_topology
    from maxlm.programs.compile import topology_devices
    from maxlm.sharding import MeshConfig, make_mesh

    axes = make_mesh(MeshConfig(data=2, fsdp=4), topology_devices(parse_topology("v5p:2x2x2")))
    B, D, F, L = 16, 256, 512, 6

    def local(x, up, down):
        def body(x, own):
            a, b = (lax.all_gather(w, "fsdp", axis=0, tiled=True) for w in own)
            return jnp.sin(jnp.cos(x @ a) @ b), None

        x = lax.scan(body, x, (up, down))[0]
        return lax.psum(x, "data")

    specs = P(("data", "fsdp")), P(None, "fsdp"), P(None, "fsdp")
    shapes = (8 * B, D), (L, D, F), (L, F, D)
    step = jax.shard_map(local, mesh=axes, in_specs=specs, out_specs=P("fsdp"), check_vma=False)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(axes, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    text = jax.jit(step).lower(*arguments).compile().as_text()
    cost = compiled_cost(text, dict(axes.shape), on_chip=(1,))
    assert cost.matmul_flops == L * 2 * 2 * B * D * F
    gathered = L * 2 * prod((D, F)) * 2 * 3 // 4
    assert cost.wire_bytes(kind="all-gather", axes="fsdp") == gathered
    assert cost.wire_bytes(axes="data") > 0
    assert {c.axes for c in cost.collectives} == {"fsdp", "data"}
    assert np.isfinite(cost.memory_bytes)
