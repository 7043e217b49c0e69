"""What ``python -m pallas_kernels.bench`` compares: for each kind of kernel, who contends.

To add a kind: a function of the command's options that returns a :class:`Benchmark`, and its name
in ``BENCHMARKS``. A program is a function that returns (callable, arguments), see ``Spec``; how
often its kernels' parts run is found from the program itself.
"""

import argparse
from collections.abc import Callable

from pallas_kernels.static.benchmarks.attention import attention
from pallas_kernels.static.benchmarks.contest import Benchmark, Contender, Pass
from pallas_kernels.static.benchmarks.grouped_matmul import grouped_matmul
from pallas_kernels.static.benchmarks.linear_cross_entropy import linear_cross_entropy

__all__ = ["BENCHMARKS", "Benchmark", "Contender", "Pass"]

BENCHMARKS: dict[str, Callable[[argparse.Namespace], Benchmark]] = {
    "attention": attention,
    "grouped_matmul": grouped_matmul,
    "linear_cross_entropy": linear_cross_entropy,
}
