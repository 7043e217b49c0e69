"""Costs of programs that nobody compiled."""

from benchmarks.kernel_cycles.static import CHIPS, CallCosts, KernelCosts, RegionCosts


def region(**changes) -> RegionCosts:
    """An inner loop's."""
    given = dict.fromkeys(("depth", "runs", "bundles", "cycles", "cycles_inside", "mxu_cycles"), 8)
    given |= {"spill_stores": 0, "spill_loads": 7, "innermost": True, "use": {"MXU": 0.5}}
    return RegionCosts(name="$region1", role="loop_body", **given | changes)


def kernel(cycles: int, backward: bool, *regions: RegionCosts) -> KernelCosts:
    return KernelCosts("k", True, backward, (cycles, 1), (4, 2), {"MXU": 0.25}, 100, regions)


def costs(forward: float, backward: float = 0.0, temp: int = 0, spills: int = 0) -> CallCosts:
    """Of so many microseconds on a v5p."""
    clock = CHIPS["v5p"].clock / 1e6
    loops = [region(spill_stores=spills), region(spill_stores=1, innermost=False)]
    kernels = [kernel(round(forward * clock), False, region(spill_stores=3))]
    if backward:
        kernels.append(kernel(round(backward * clock), True, *loops))
    return CallCosts(CHIPS["v5p"], tuple(kernels), (), temp)
