"""What ``python -m benchmarks.kernel_cycles.bench`` compares: who contends, by kind of
kernel.

To add a kind: a function of the command's options that returns a :class:`Benchmark`,
and its name in ``BENCHMARKS``. A program is a function that returns (callable,
arguments), see ``Spec``; how often its kernels' parts run is found from the program
itself.
"""

import argparse
from collections.abc import Callable

from benchmarks.kernel_cycles.contests.attention import attention
from benchmarks.kernel_cycles.contests.contest import Benchmark, Contender, Pass
from benchmarks.kernel_cycles.contests.grouped_matmul import grouped_matmul
from benchmarks.kernel_cycles.contests.linear_recurrence import linear_recurrence
from benchmarks.kernel_cycles.contests.paged_attention import paged_attention

__all__ = ["BENCHMARKS", "Benchmark", "Contender", "Pass"]

BENCHMARKS: dict[str, Callable[[argparse.Namespace], Benchmark]] = {
    "attention": attention,
    "grouped_matmul": grouped_matmul,
    "linear_recurrence": linear_recurrence,
    "paged_attention": paged_attention,
}
