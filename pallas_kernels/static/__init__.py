"""Costs of TPU kernels without a TPU: what the compiler's final schedule says, cycle by cycle.

:func:`measure` compiles a function for a chip and returns the cycles of each of its kernels.
"""

from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.static.costs import CallCosts, KernelCosts, RegionCosts
from pallas_kernels.static.measure import CompileError, Spec, measure

__all__ = [
    "CHIPS",
    "CallCosts",
    "Chip",
    "CompileError",
    "KernelCosts",
    "RegionCosts",
    "Spec",
    "measure",
]
