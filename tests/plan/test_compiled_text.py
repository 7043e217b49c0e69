"""Printed forms of compiled programs that these compilers do not print here: TPU's and
GPU's ways of writing products and collectives, and every form of replica groups."""

import pytest

from benchmarks.program_traffic import CustomCall, read_program_traffic
from maxlm.plan.compiled.cost import read_compiled_cost
from maxlm.plan.compiled.groups import parse_replica_groups
from maxlm.plan.compiled.hlo import parse_hlo

ONE = {"data": 1}


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


def test_variadic_collectives_sum_their_parts():
    text = module(
        """
  %a = f32[8]{0} parameter(0)
  %b = bf16[16]{0} parameter(1)
  ROOT %sums = (f32[8]{0}, /*index=1*/bf16[16]{0}) all-reduce(%a, %b), channel_id=1, \
replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%add
"""
    )
    (found,) = read_compiled_cost(text, {"data": 2, "tensor": 2}).collectives
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
    cost = read_compiled_cost(text, {"data": 2, "fsdp": 4})
    shard = 64 * 32 * 2
    assert cost.wire_by_kind_and_axes() == {
        ("all-gather", "fsdp"): 3 * shard,
        ("reduce-scatter", "fsdp"): 3 * shard,
    }
    assert [c.count for c in cost.collectives] == [1, 1]


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
    cost = read_compiled_cost(text, {"data": 2, "fsdp": 8})
    assert cost.wire_by_kind_and_axes() == {
        ("all-reduce", "data"): 1024 * 64 * 2,
        ("reduce-scatter", "fsdp"): 1152 * 64 * 2 * 7 // 8,
    }


def test_a_collective_spread_under_several_fusions_is_one():
    """XLA:TPU prints it where it starts, in each computation that it runs under, and
    where it ends; the bytes in flight are counted once too. Another one of the same
    channel, alone or in a fusion of its own, is another one."""
    started = "(bf16[16,64]{1,0}, bf16[128,64]{1,0}, u32[]{:S(2)})"
    gather = """channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, \
use_global_device_ids=true"""
    text = module(
        f"""
  %x = bf16[16,64]{{1,0}} parameter(0)
  %y = bf16[32,32]{{1,0}} parameter(1)
  %z = bf16[64,64]{{1,0}} parameter(2)
  %alone = bf16[8,64]{{1,0}} reduce-scatter(%z), {gather}, to_apply=%add
  %fused = bf16[8,64]{{1,0}} fusion(%z), kind=kCustom, calls=%scatters
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

%scatters (p: bf16[64,64]) -> bf16[8,64] {{
  %p = bf16[64,64]{{1,0}} parameter(0)
  ROOT %g = bf16[8,64]{{1,0}} reduce-scatter(%p), {gather}, to_apply=%add
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
    cost = read_compiled_cost(text, {"fsdp": 8})
    traffic = read_program_traffic(text, (1, 2))
    assert {c.kind: (c.count, c.wire_bytes) for c in cost.collectives} == {
        "all-gather": (1, 7 * 16 * 64 * 2),
        "reduce-scatter": (2, 2 * 7 * 8 * 64 * 2),
    }
    assert traffic.custom_calls == []
    started_bytes, under, scatters = (
        (16 + 16 + 128) * 64 * 2,
        2 * 32 * 32 * 2,
        (64 + 8) * 64 * 2,
    )
    assert traffic.memory_bytes == started_bytes + under + 2 * scatters


# window and labels, lhs, rhs, result, 2·M·N·K
CONVOLUTIONS = {
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
    assert read_compiled_cost(text, ONE).matmul_flops == flops


def test_calls_of_matrix_libraries_and_custom_kernels():
    """A kernel's metadata and cost estimate stand on lines of their own."""
    text = module(
        """
  %x = bf16[16,32]{1,0} parameter(0)
  %w = bf16[32,24]{1,0} parameter(1)
  %y = (bf16[16,24]{1,0}, s8[1024]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"]}}}
  %k = (bf16[16,32]{1,0}, f32[16]{0}) custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/splash"}, backend_config={"custom_call_config": {"cost_estimate": {
"flops":1234
}, "serialization_format": 1}}
  %b = bf16[16,32]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %o = bf16[16,32]{1,0} get-tuple-element(%k), index=0, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/splash"}
"""
    )
    assert parse_hlo(text).entry.root == "o"
    assert read_compiled_cost(text, ONE).matmul_flops == 2 * 16 * 32 * 24
    calls = read_program_traffic(text).custom_calls
    assert calls == [CustomCall("tpu_custom_call", "jit(f)/splash", 1234, 1)]


GROUPS = {
    "{{0,1},{2,3}}": [[0, 1], [2, 3]],
    "{}": [list(range(8))],
    "[2,4]<=[4,2]T(1,0)": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "[4,2]<=[2,2,2]T(2,0,1)": [[0, 2], [4, 6], [1, 3], [5, 7]],
    "mesh['data'=2,'fsdp'=4] {'data'}": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "mesh['a'=2,'b'=2,'c'=2] {'c','a'}": [[0, 4, 1, 5], [2, 6, 3, 7]],
    "mesh['a'=8] {'a':(2)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "mesh[a=2,b=4] {b:(1)2,a}": [[0, 4, 2, 6], [1, 5, 3, 7]],
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}": [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ],
    "mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}": [[3, 1], [2, 0]],
}


@pytest.mark.parametrize("form", GROUPS)
def test_replica_groups_in_every_printed_form(form):
    assert (
        parse_replica_groups(f"replica_groups={form}, dimensions={{0}}", 8)
        == GROUPS[form]
    )


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="unknown form"):
        parse_replica_groups("replica_groups=<something new>", 8)
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_hlo("something else\n")
