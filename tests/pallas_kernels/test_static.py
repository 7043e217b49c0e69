"""The reader of the TPU compiler's schedules, on one written here, and what is made of
it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.kernel_cycles.static import CHIPS
from benchmarks.kernel_cycles.static.control import run_counts
from benchmarks.kernel_cycles.static.costs import call_costs, kernel_costs
from benchmarks.kernel_cycles.static.prefetch import KernelCall, kernel_calls, words
from benchmarks.kernel_cycles.static.scalar import (
    UNKNOWN,
    Unknown,
    bundle_lines,
    signed,
)
from benchmarks.kernel_cycles.static.schedule import parse_schedule

# A loop of eight steps, on core 0 alone, over a table in scalar memory. A step
# multiplies matrices; where its entry is positive, a predicated region spills.
BUNDLES = """
     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: s32[8], index: 0, kind: input] /* a
two-line comment */  ;;  %s2_s9 = sld [smem:[#allocation0]] /* core id */ }
   0x1   :  { %p1_p0 = scmp.ne.s32.totalorder %s2_s9, 0  ;;  %s3_s1 = smov.u32 [#allocation2] }
   0x2   :  { %9 = sbr.rel (%p1_p0) target bundleno = 26 (0x1a), region = 9 }
   0x3   :  {}
   0x7   :  { %10 = dma.hbm_to_smem /*hbm=*/%s1_s0, /*size=*/1, /*smem=*/%s3_s1, [#allocation1] }
   0x8   :  { %s4_s2 = smov.u32 0 }
   0x9 LB: > { %s5_s3 = sld [smem:[#allocation2 + %s6_s2]]  ;;  %s6_s2 = sphi %s4_s2, %s8_s2 }
   0xa   : > { %11 = vmatmul.bf16.gmra.mxu0 %v1_v0  ;;  %p2_p1 = scmp.le.s32.totalorder %s5_s3, 0 }
   0xb   : > { %12 = sbr.rel (%p2_p1) target bundleno = 18 (0x12), region = 8 }
  0x10   : > { %13 = vst [vmem:[#allocation3_spill]] %v1_v0 }
  0x11   : > { %s7_s4 = sshra.s32 %s5_s3, 1 }
  0x12 PF: > { %s8_s2 = sadd.s32 1, %s6_s2  ;;  %14 = vmatmul.bf16.gmra.mxu0 %v1_v0 }
  0x13   : > { %p3_p2 = scmp.ge.s32.totalorder %s8_s2, 8 }
  0x14   : > { %15 = sbr.rel (!%p3_p2) target bundleno = 9 (0x9), region = 5 }
  0x19   :  {}
  0x1a   :  { %16 = vsyncpa [#allocation1], 1 }
"""
REGIONS = """
$region0: #{kernel.1}
  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, fixed_abs, tag = 'core']
  #allocation1 [shape = 's32[1]{0}', space=sflag, size = 0x4, offset = 0, scoped, tag = 'flag']
  #allocation2 [shape = 'u8[32]{0}', space=smem, size = 0x20, offset = 0x40, scoped, tag = 'table']
  // region range: [0, 27)
  $region1: #{kernel.1} parent=0 // pred_check_branch
    // region range: [0, 7)
  $region2 (PrimaryCoreRegion): #{kernel.1} parent=0 // pred_region
    // region range: [1, 26)
    iteration_bounds: (2, 4)
    $region5: #{kernel.1} parent=2 (PrimaryCoreRegion) // loop_body
      // region range: [9, 25)
      $region6: #{kernel.1} parent=5 // pred_check_branch
        // region range: [9, 16)
      $region7: #{kernel.1} parent=5 // pred_region
        // region range: [9, 18)
      $region8: #{kernel.1} parent=5 // pred_fallthru
        // region range: [18, 18)
"""
UNITS = ["MATMUL", "VALU", "VSTORE:SPILL"]
STEP = 25 - 9 - 2
SPILLING = 2
OUTSIDE = 9 + 2


def unit_use() -> str:
    rows = np.zeros((27, 3), int)
    rows[[10, 18], 0] = 4, 2
    rows[16, 2] = 1
    body = "\n".join(" ".join(map(str, row)) for row in rows)
    return f"== CAPACITY:\n{', '.join(UNITS)}\n 4 4 1\n== UTILIZATION:\n{body}\n"


def schedule(bundles: str = BUNDLES):
    return parse_schedule("kernel.1", bundles, REGIONS, unit_use())


def table(*values: int) -> dict[int, np.ndarray]:
    return {0: words(np.array(values, np.int32), "{0:T(128)}")[:8]}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=8, max_size=8))
def test_cycles_are_bundles_times_runs(entries):
    costs = kernel_costs(schedule(), 2, table(*entries))
    positive = sum(x > 0 for x in entries)
    assert costs.cycles_by_core == (OUTSIDE + 8 * STEP + positive * SPILLING, 7 + 1)
    assert costs.cores == 1
    assert costs.mxu_cycles == 8 * 6
    assert costs.use["MATMUL"] == pytest.approx(8 * 6 / (4 * costs.cycles))
    (loop,) = costs.inner_loops
    assert (loop.runs, loop.bundles, loop.spill_stores) == (8, STEP, 0)
    assert loop.cycles_inside == 8 * STEP + positive * SPILLING
    spilling = [r for r in costs.regions if r.name == "7"]
    assert [(r.runs, r.spill_stores) for r in spilling] == [(positive, 1)] * bool(
        positive
    )


def test_a_branch_on_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"kernel\.1.*bundle 16"):
        run_counts(schedule())
    computed = BUNDLES.replace("smov.u32 0 }", "spop %v1_v0 }")
    with pytest.raises(ValueError, match="scalar unit"):
        run_counts(schedule(computed), 0, table(*range(8)))


WORDS = st.integers(0, 2**32 - 1) | st.integers(0, 40)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_scalar_instructions(a, b):
    signed = np.array([a, b], np.uint32).view(np.int32)
    shift = b % 32
    expected = {
        "sadd.s32": (a + b) % 2**32,
        "ssub.s32": (a - b) % 2**32,
        "smul.u32": a * b % 2**32,
        "smulhi.u32": a * b // 2**32,
        "sand.u32": a & b,
        "sor.u32": a | b,
        "sshll.u32": a * 2**shift % 2**32,
        "sshrl.u32": a // 2**shift,
        "sshra.s32": int(signed[0]) // 2**shift % 2**32,
        "smin.u32": min(a, b),
        "smax.s32": int(max(signed)) % 2**32,
        "scmp.lt.s32.totalorder": signed[0] < signed[1],
        "scmp.lt.u32.totalorder": a < b,
        "scmp.ge.s32.totalorder": signed[0] >= signed[1],
    }
    for operation, value in expected.items():
        text = f"%s7_s3 = {operation} %s1_s0, %s2_s1"
        assert int(_executed(text, s0=a, s1=b)["s3"]) == value, operation


def _executed(bundle: str, **registers: Any) -> dict[str, Any]:
    """Registers after one bundle."""
    read = schedule()
    read.bundles[0] = bundle
    names = {
        "M": 2**32 - 1,
        "UNKNOWN": UNKNOWN,
        "Unknown": Unknown,
        "signed": signed,
        **registers,
    }
    exec("\n".join(bundle_lines(read, 0, set())), names)
    return names


HLO = """
  %table = s32[8]{0:T(128)} constant({...})
  %kernel.1 = bf16[8,8]{1,0} custom-call(%table), custom_call_target="tpu_custom_call", config={
"x"}}, metadata={op_name="jit(f)/transpose(jvp())/kernel"}
}
"""


def test_a_call_takes_the_values_its_kernel_prefetches():
    entries = np.array([1, 0, 2, 0, 0, 3, 0, 0], np.int32)
    call = KernelCall(["s32[8]"], {0: entries})
    other = KernelCall(["s32[9]"], {})
    costs = call_costs([schedule()], HLO, [other, call], CHIPS["v5p"], 7)
    assert costs.cycles(backward=False) == 0
    assert (
        costs.cycles()
        == costs.cycles(backward=True)
        == OUTSIDE + 8 * STEP + 3 * SPILLING
    )
    assert costs.microseconds() == pytest.approx(costs.cycles() / 1750.98, rel=1e-4)
    assert costs.mxu_flops() == 48 * 2 * 128**2
    with pytest.raises(ValueError, match="not given"):
        call_costs([schedule()], HLO, [other], CHIPS["v5p"], 7)


def _kernel(bounds, x, o):
    del bounds
    o[...] = x[...]


def _prefetching(bounds: jax.Array, x: jax.Array) -> jax.Array:
    spec = pl.BlockSpec((8, 128), lambda i, bounds: (bounds[i], 0))
    call = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(4,), in_specs=[spec], out_specs=spec
        ),
    )
    return call(bounds, x)


def test_prefetched_values_are_computed_and_nothing_else():
    @jax.custom_vjp
    def step(ids, x):
        starts = jnp.cumsum(jnp.bincount(ids, length=4)).astype(jnp.int32)
        return jax.jit(_prefetching)(starts - starts[0], x)

    step.defvjp(lambda ids, x: (step(ids, x), None), lambda _, g: (None, g))

    def program(ids, x):
        y = jax.lax.platform_dependent(
            ids, x, tpu=step, default=lambda ids, x: jnp.zeros_like(x)
        )
        return _prefetching(y[0, :4].astype(jnp.int32), y)

    x = jax.ShapeDtypeStruct((32, 128), jnp.float32)
    ids = np.array([0, 0, 1, 3, 3, 3], np.int32)
    traced = jax.make_jaxpr(program)(ids, x)
    first, second = kernel_calls(traced, (ids, x))
    assert first.shapes == ["s32[4]", "f32[32,128]"]
    assert first.values[0].tolist() == [0, 1, 1, 4]
    assert second.values == {}
    first, _ = kernel_calls(traced, (jax.ShapeDtypeStruct(ids.shape, ids.dtype), x))
    assert first.values == {}
