"""Kernels with which the engine decodes on CPUs, in C++, compiled where they run.

Decoding multiplies few rows by every parameter, so its time is that of reading them;
XLA's libraries for CPUs read them at a fraction of the memory's bandwidth
(benchmarks/README.md). Nothing else uses these kernels: programs on CPUs otherwise
compute what XLA makes of them.
"""

from jax.sharding import Mesh

from maxlm.inference.cpu import paged_attention
from maxlm.inference.cpu.library import find_missing_compiler, load_library
from maxlm.inference.cpu.matmul import multiply_few_rows
from maxlm.parallel.decode_kernels import DecodeKernels

CPU_KERNELS = DecodeKernels(multiply_few_rows, paged_attention)
"""Compiled when a step that they support is traced; where there is no compiler, XLA
computes the same."""


def choose_decode_kernels(platform: str) -> DecodeKernels | None:
    """Returns the kernels for a mesh of JAX's ``platform``, None where XLA's programs
    and Pallas's kernels do all."""
    return CPU_KERNELS if platform == "cpu" else None


def find_missing_cpu_compiler(mesh: Mesh) -> str | None:
    """Returns the name of the C++ compiler for want of which the engine on ``mesh``
    decodes without these kernels; None: it has them, needs none, or the compiler is
    there."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    compiler = find_missing_compiler()
    # The kernels may have been compiled before.
    if compiler is not None and load_library() is None:
        return compiler
    return None
