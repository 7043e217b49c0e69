"""Costs of TPU kernels without a TPU: what the compiler's final schedule says, cycle by
cycle.

:func:`measure` compiles a function for a chip and returns the cycles of each of its
kernels.
"""

from benchmarks.kernel_cycles.static.costs import CallCosts, KernelCosts, RegionCosts
from benchmarks.kernel_cycles.static.measure import CompileError, Spec, measure
from pallas_kernels.chips import CHIPS, TpuChip

__all__ = [
    "CHIPS",
    "CallCosts",
    "CompileError",
    "KernelCosts",
    "RegionCosts",
    "Spec",
    "TpuChip",
    "measure",
]
