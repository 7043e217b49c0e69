"""Cycles of a compiled program's kernels: their schedules times how often each part
runs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.kernel_cycles.static.control import knows_core, run_counts
from benchmarks.kernel_cycles.static.prefetch import KernelCall, words
from benchmarks.kernel_cycles.static.schedule import Region, Schedule
from pallas_kernels.chips import TpuChip

SPILL_STORES, SPILL_LOADS = "VSTORE:SPILL", "VLOAD:FILL"
_CORE_IS_IDLE = 0.1
_OPERAND = re.compile(r"%([\w.\-]+)")
_HBM_READ = re.compile(r"= dma\.hbm_to_vmem [^;]*?, (\d+), ")
_GRANULE_BYTES = 32


@dataclass(frozen=True)
class RegionCosts:
    """A loop's body or predicated region; without the regions inside it, unless
    said."""

    name: str
    role: str
    depth: int
    runs: int
    bundles: int
    """Of one run."""
    cycles: int
    """Of all runs."""
    cycles_inside: int
    """Of all runs, with the regions inside."""
    use: dict[str, float]
    """Of each unit's capacity, while it runs."""
    mxu_cycles: int
    """Of one run, summed over the matrix units."""
    spill_stores: int
    spill_loads: int
    innermost: bool

    @property
    def cycles_per_run(self) -> float:
        """With the regions inside."""
        return self.cycles_inside / self.runs if self.runs else 0.0


@dataclass(frozen=True)
class KernelCosts:
    """A kernel, or an operation of XLA's own, over one call."""

    name: str
    pallas: bool
    backward: bool
    """Whether differentiation made it."""
    cycles_by_core: tuple[int, ...]
    """Of one core where the kernel is not split."""
    grid: tuple[int, ...] | None
    """Of one core, where the compiler states it."""
    use: dict[str, float]
    """Of each unit's capacity, over the busiest core's cycles."""
    mxu_cycles: int
    """Occupied, over all cores and matrix units."""
    regions: tuple[RegionCosts, ...]
    """Of the busiest core, those that run."""
    hbm_read_bytes: int = 0
    """Copied from HBM to VMEM, over all cores; a copy that hangs on a condition counts
    as done."""

    @property
    def cycles(self) -> int:
        """Of the busiest core."""
        return max(self.cycles_by_core)

    @property
    def cores(self) -> int:
        """That share the work."""
        return sum(c > _CORE_IS_IDLE * self.cycles for c in self.cycles_by_core)

    @property
    def inner_loops(self) -> tuple[RegionCosts, ...]:
        """Regions that multiply matrices and hold no other that does."""
        return tuple(r for r in self.regions if r.innermost and r.mxu_cycles)

    @property
    def spills(self) -> int:
        """Spill stores and loads in the inner loops, as scheduled."""
        return sum(r.spill_stores + r.spill_loads for r in self.inner_loops)


@dataclass(frozen=True)
class CallCosts:
    """A compiled program."""

    chip: TpuChip
    kernels: tuple[KernelCosts, ...]
    """Pallas's."""
    others: tuple[KernelCosts, ...]
    """XLA's own operations. Most wait for memory longer than their cycles say."""
    temp_bytes: int
    """Of HBM, beside arguments and results."""

    def cycles(self, *, backward: bool | None = None) -> int:
        """Of the kernels; of the forward's or the backward's alone where asked."""
        chosen = [k for k in self.kernels if backward is None or k.backward == backward]
        return sum(k.cycles for k in chosen)

    def mxu_flops(self, *, backward: bool | None = None) -> float:
        """What the matrix units could have multiplied in the cycles they were
        occupied."""
        chosen = [k for k in self.kernels if backward is None or k.backward == backward]
        return sum(k.mxu_cycles for k in chosen) * self.chip.flops_per_mxu_cycle

    def microseconds(self, *, backward: bool | None = None) -> float:
        """Cycles at the chip's clock."""
        return self.cycles(backward=backward) / self.chip.clock_hz * 1e6


def call_costs(
    schedules: Sequence[Schedule],
    hlo: str,
    calls: Sequence[KernelCall],
    chip: TpuChip,
    temp_bytes: int,
) -> CallCosts:
    """Costs of a program.

    Args:
        schedules: of its operations.
        hlo: its text, scheduled.
        calls: its kernels, with the values they prefetch.

    Raises:
        ValueError: a Pallas kernel whose control flow cannot be followed.
    """
    kernels = []
    others = []
    left = list(calls)
    for schedule in schedules:
        text = _instruction(hlo, schedule.name)
        if text is None:
            continue
        pallas = 'custom_call_target="tpu_custom_call"' in text
        operands = _scalar_operands(schedule, text, hlo, left) if pallas else {}
        backward = "transpose(" in (re.search(r'op_name="([^"]*)"', text) or [""])[0]
        try:
            arguments = schedule, chip.num_cores, operands
            costs = kernel_costs(*arguments, pallas=pallas, backward=backward)
        except ValueError:
            if pallas:
                raise
            continue  # Its loops hang on data; no figure is better than a wrong one.
        (kernels if pallas else others).append(costs)
    return CallCosts(chip, tuple(kernels), tuple(others), temp_bytes)


def kernel_costs(
    schedule: Schedule,
    cores: int = 1,
    operands: Mapping[int, np.ndarray] | None = None,
    *,
    pallas: bool = True,
    backward: bool = False,
) -> KernelCosts:
    """Costs of one kernel; arguments as of :func:`run_counts`."""
    split = range(cores if knows_core(schedule) else 1)
    counts = [run_counts(schedule, core, operands) for core in split]
    cycles = tuple(int(c.sum()) for c in counts)
    busiest = counts[int(np.argmax(cycles))]
    mxu = _mxu(schedule)
    regions = [_region_costs(schedule, r, busiest, mxu) for r in schedule.regions]
    return KernelCosts(
        name=schedule.name,
        pallas=pallas,
        backward=backward,
        cycles_by_core=cycles,
        grid=schedule.grid,
        use=_share(schedule, busiest),
        mxu_cycles=int(sum((c * mxu).sum() for c in counts)),
        regions=tuple(r for r in regions if r.runs),
        hbm_read_bytes=_hbm_read_bytes(schedule, np.sum(counts, axis=0)),
    )


def _hbm_read_bytes(schedule: Schedule, counts: np.ndarray) -> int:
    granules = [sum(map(int, _HBM_READ.findall(bundle))) for bundle in schedule.bundles]
    return int(np.dot(counts, granules)) * _GRANULE_BYTES


def _mxu(schedule: Schedule) -> np.ndarray:
    """Cycles that each bundle occupies matrix units."""
    name = "MATMUL" if "MATMUL" in schedule.units else "MXU"
    return schedule.use[:, schedule.units.index(name)]


def _share(schedule: Schedule, counts: np.ndarray) -> dict[str, float]:
    cycles = max(1, int(counts.sum()))
    used = (schedule.use * counts[:, None]).sum(0) / (cycles * schedule.capacity)
    return dict(zip(schedule.units, used.tolist(), strict=True))


def _region_costs(
    schedule: Schedule, region: Region, counts: np.ndarray, mxu: np.ndarray
) -> RegionCosts:
    is_own = np.zeros(len(counts), bool)
    for start, stop in region.own():
        is_own[start:stop] = True
    use = dict(zip(schedule.units, schedule.use[is_own].sum(0).tolist(), strict=True))
    inside = [bool(mxu[c.start : c.stop].any()) for c in region.children]
    return RegionCosts(
        name=region.name,
        role=region.role,
        depth=region.depth,
        runs=int(counts[is_own].max(initial=0)),
        bundles=int(is_own.sum()),
        cycles=int(counts[is_own].sum()),
        cycles_inside=int(counts[region.start : region.stop].sum()),
        use=_share(schedule, np.where(is_own, counts, 0)),
        mxu_cycles=int(mxu[is_own].sum()),
        spill_stores=use.get(SPILL_STORES, 0),
        spill_loads=use.get(SPILL_LOADS, 0),
        innermost=not any(inside),
    )


def _instruction(hlo: str, name: str) -> str | None:
    """Text of an HLO instruction, which may go over lines."""
    match = re.search(rf"^ *(?:ROOT )?%{re.escape(name)} = ", hlo, re.MULTILINE)
    if match is None:
        return None
    end = re.search(r"\n *(?:ROOT )?%[\w.\-]+ = |\n\}\n", hlo[match.end() :])
    return hlo[match.start() : match.end() + end.start() if end else len(hlo)]


def _scalar_operands(
    schedule: Schedule, text: str, hlo: str, calls: list[KernelCall]
) -> dict[int, np.ndarray]:
    """Words of the operands whose values are known; takes its call from ``calls``."""
    for call in calls:
        if all(
            i < len(call.shapes) and call.shapes[i] == shape
            for i, shape in schedule.operands.items()
        ):
            break
    else:
        return {}
    calls.remove(call)
    inside = re.search(r"custom-call\((.*?)\), custom_call_target", text, re.DOTALL)
    names = _OPERAND.findall(inside[1]) if inside else []
    operand_words = {}
    for i, value in call.values.items():
        definition = _instruction(hlo, names[i]) if i < len(names) else None
        layout = re.search(r"= \(?\w+\[[\d,]*\](\{[^}]*\})?", definition or "")
        operand_words[i] = words(value, (layout[1] if layout else None) or "{}")
    return operand_words
