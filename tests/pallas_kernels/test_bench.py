"""The table of attention's figures: what it shows, and that nothing is measured again
unless what it follows from has changed."""

from pathlib import Path

import pytest

from benchmarks.kernel_cycles.contests import Contender, Pass, cache
from benchmarks.kernel_cycles.contests.contest import OWN, Row
from benchmarks.kernel_cycles.contests.survey import ContestCell
from benchmarks.kernel_cycles.contests.table import table
from benchmarks.kernel_cycles.static import (
    CHIPS,
    CallCosts,
    KernelCosts,
    RegionCosts,
    Spec,
)
from benchmarks.kernel_cycles.static.problems import Shape

FORWARD, BACKWARD = Pass("forward", 0, False), Pass("backward", 0, True)
SHAPE = Shape(64, 4096, "window:1024")


def region(**changes) -> RegionCosts:
    """An inner loop's."""
    arguments = dict.fromkeys(
        ("depth", "runs", "bundles", "cycles", "cycles_inside", "mxu_cycles"), 8
    )
    arguments |= {
        "spill_stores": 0,
        "spill_loads": 7,
        "innermost": True,
        "use": {"MXU": 0.5},
    }
    return RegionCosts(name="$region1", role="loop_body", **arguments | changes)


def kernel(cycles: int, backward: bool, *regions: RegionCosts) -> KernelCosts:
    return KernelCosts(
        "k", True, backward, (cycles, 1), (4, 2), {"MXU": 0.25}, 100, regions
    )


def costs(
    forward: float, backward: float = 0.0, temp: int = 0, spills: int = 0
) -> CallCosts:
    """Of so many microseconds on a v5p."""
    clock = CHIPS["v5p"].clock_hz / 1e6
    loops = [region(spill_stores=spills), region(spill_stores=1, innermost=False)]
    kernels = [kernel(round(forward * clock), False, region(spill_stores=3))]
    if backward:
        kernels.append(kernel(round(backward * clock), True, *loops))
    return CallCosts(CHIPS["v5p"], tuple(kernels), (), temp)


def outcomes(of: Pass, **results) -> dict:
    """By contender's name, of costs."""
    names = {"own": OWN, "splash": "jax splash", "flash": "jax flash"}
    return {
        names[key]: Row(Contender(names[key], {}, key != "own"), of, Spec("m:f"), value)
        for key, value in results.items()
    }


def test_a_cell_shows_time_ratio_spills_and_memory_beside_the_best_peer():
    results = {
        ContestCell(SHAPE, "v5p", "forward"): outcomes(
            FORWARD, own=costs(90.0), splash=costs(125.0), flash=costs(100.0)
        ),
        ContestCell(SHAPE, "v5p", "backward"): outcomes(
            BACKWARD,
            own=costs(100.0, 1900.4, temp=8_700_000, spills=1234),
            splash=costs(1.0, 2000.0, temp=2_500_000_000),
            flash=costs(1.0, 3000.0, temp=1_234_400_000),
        ),
    }
    header, _, ours, peer, *rest = table(results).splitlines()
    assert (
        header
        == "| head, sequence, mask | µs | v5p forward | backward | spills | temp MB |"
    )
    assert (
        ours
        == "| 64 4,096 window:1024 | ours | 90.0 (0.90) | 1,900 (0.95) | 3/1,234 | 8.7 "
        "|"
    )
    # Memory is the least of the peers', whose backward pass is not the fastest here.
    assert peer == "| | best peer | 100.0 flash | 2,000 splash | | 1,234 |"
    assert rest == [
        "",
        "1 of 2 ratios are at most 0.90, all but",
        "",
        "- v5p 64, 4,096, window:1024 backward: 0.950",
    ]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A cache's; what it measures is counted."""
    specs = []

    def measure(spec, chip):
        specs.append(spec)
        return costs(100.0, 200.0, 12345, spills=6)

    monkeypatch.setattr(cache, "measure", measure)
    monkeypatch.setattr(cache, "versions", lambda *names: ", ".join(names))
    return tmp_path / "deep" / "folder", specs


def test_what_costs_follow_from_is_measured_again(folder, monkeypatch):
    where, specs = folder
    ours = Spec("benchmarks.kernel_cycles.contests.attention:own_attention", {"seq": 1})
    peer = Spec("benchmarks.kernel_cycles.static.peers:tokamax_splash", {"seq": 1})

    def measured() -> list[str]:
        specs.clear()
        for spec in (ours, peer):
            cache.Cache(where).measure(spec, "v5p")
        return [spec.function.rpartition(":")[2] for spec in specs]

    both = ["own_attention", "tokamax_splash"]
    assert (measured(), measured()) == (both, [])
    # A list, as JSON makes of a tuple, is the same.
    first, again = (
        cache.Cache(folder).measure(ours, "v5p") for folder in (where / "new",) * 2
    )
    assert repr(first) == repr(again)
    read = Path.read_bytes

    def edited(name):
        def read_bytes(path):
            return read(path) + b"#" if path.name == name else read(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)

    for name, expected in {
        "tpu_backward.py": ["own_attention"],
        "tuned.json": ["own_attention"],
        "control.py": both,
        "bench.py": [],
        "table.py": [],
    }.items():
        edited(name)
        assert (name, measured()) == (name, expected)
        assert measured() == []
    monkeypatch.setattr(cache, "versions", lambda *names: f"{names} 2")
    assert measured() == both
    cache.Cache(where).measure(ours, "v6e")
    assert len(specs) == 3
