"""The table of attention's figures: what it shows, what it misses, and what is measured for it."""

import argparse
from importlib import import_module

import pytest

from benchmarks.kernel_cycles.contests import BENCHMARKS, Benchmark, Contender, Pass
from benchmarks.kernel_cycles.contests.contest import FAR, OWN, Row, contest
from benchmarks.kernel_cycles.contests.survey import Cell, survey
from benchmarks.kernel_cycles.contests.table import table
from benchmarks.kernel_cycles.static import CallCosts, CompileError, Spec
from benchmarks.kernel_cycles.static.problems import Shape
from tests.pallas_kernels.costs import costs

FORWARD, BACKWARD = Pass("forward", 0, False), Pass("backward", 0, True)
SHAPE = Shape(64, 4096, "window:1024")
PEERS = ("jax splash", "jax flash", "tokamax splash")


def contender(name: str, count: int = 1) -> Contender:
    """Of programs that name themselves."""
    programs = {
        of.name: [Spec("m:f", {"who": name, "pass": of.name, "n": n}) for n in range(count)]
        for of in (FORWARD, BACKWARD)
    }
    return Contender(name, programs, peer=name != OWN)


def outcomes(of: Pass, **found) -> dict:
    """By contender's name, of costs or exceptions."""
    names = {"own": OWN, "splash": PEERS[0], "flash": PEERS[1], "tokamax": PEERS[2]}
    return {
        names[key]: value
        if isinstance(value, Exception)
        else Row(contender(names[key]), of, Spec("m:f"), value)
        for key, value in found.items()
    }


def test_a_cell_shows_time_ratio_spills_and_memory_beside_the_best_peer():
    results = {
        Cell(SHAPE, "v5p", "forward"): outcomes(
            FORWARD, own=costs(90.0), splash=costs(125.0), flash=costs(100.0)
        ),
        Cell(SHAPE, "v5p", "backward"): outcomes(
            BACKWARD,
            own=costs(100.0, 1900.4, temp=8_700_000, spills=1234),
            splash=costs(1.0, 2000.0, temp=2_500_000_000),
            flash=costs(1.0, 3000.0, temp=1_234_400_000),
        ),
    }
    header, _, ours, peer, *rest = table(results).splitlines()
    assert header == "| head, sequence, mask | µs | v5p forward | backward | spills | temp MB |"
    assert ours == "| 64 4,096 window:1024 | ours | 90.0 (0.90) | 1,900 (0.95) | 3/1,234 | 8.7 |"
    # Memory is the least of the peers', whose backward pass is not the fastest here.
    assert peer == "| | best peer | 100.0 flash | 2,000 splash | | 1,234 |"
    assert rest == [
        "",
        "1 of 2 ratios are at most 0.90, all but",
        "",
        "- v5p 64, 4,096, window:1024 backward: 0.950",
    ]


def test_peers_far_behind_try_no_more_blocks():
    asked = []
    times = {
        ("jax splash", 0): 10.0,
        ("jax splash", 1): 10.0 * FAR**2,  # its best one still counts
        ("jax flash", 0): 10.5 * FAR,  # left
        ("tokamax splash", 0): 9.9 * FAR,
        ("tokamax splash", 1): 8.0,
        (OWN, 0): 99.0,  # tried on though others are far ahead
        (OWN, 1): 1.0,
    }

    def measure(spec: Spec, chip: str) -> CallCosts:
        who = spec.kwargs["who"], spec.kwargs["n"]
        asked.append(who)
        if who == ("tokamax splash", 2):
            raise CompileError("VMEM")
        return costs(times.get(who, 50.0))

    who = [contender(name, 3) for name in (*PEERS, OWN)]
    found = contest(who, FORWARD, "v5p", measure)
    best = {name: found[name].microseconds for name in found}
    assert best == pytest.approx(
        {"jax splash": 10.0, "jax flash": 10.5 * FAR, "tokamax splash": 8.0, OWN: 1.0}, rel=1e-3
    )
    assert ("jax flash", 1) not in asked
    # Behind 8 µs in the third turn.
    assert ("jax splash", 2) not in asked
    assert {("tokamax splash", 2), (OWN, 1), (OWN, 2)} <= set(asked)


def test_all_contests_are_held_peers_first():
    asked, lines = [], []
    benchmark = Benchmark("", [contender(OWN), contender("jax flash", 2)], [FORWARD, BACKWARD])

    def measure(spec: Spec, chip: str) -> CallCosts:
        asked.append(spec.kwargs["who"])
        return costs(5.0, 6.0)

    chips = ["v5p", "v6e"]
    found = survey({SHAPE: benchmark}, chips, measure, lambda *_: True, lines.append, lambda: 0)
    assert list(found) == [Cell(SHAPE, chip, of.name) for chip in chips for of in benchmark.passes]
    assert all(list(one) == ["jax flash", OWN] for one in found.values())
    assert asked == ["jax flash"] * 8 + [OWN] * 4
    assert lines[1] == "[2/8] v5p 64, 4,096, window:1024 backward: jax flash 6.0 µs"


@pytest.mark.parametrize(
    ("mask", "tokamax", "names"),
    [
        ("causal", True, PEERS),
        ("window:1024", True, (PEERS[0], PEERS[2])),
        ("segments:8", False, PEERS[:2]),
    ],
)
@pytest.mark.parametrize("seq", [640, 32768])
def test_peers_contend_where_they_can_win_with_blocks_that_divide(
    mask, tokamax, names, seq, monkeypatch
):
    # The package's attribute of this name is a function.
    module = import_module("benchmarks.kernel_cycles.contests.attention")
    monkeypatch.setattr(module, "find_spec", lambda name: tokamax or None)
    options = argparse.Namespace(mask=mask, seq=seq, batch=1, heads=8, head_dim=64, peers=True)
    own, *peers = BENCHMARKS["attention"](options).contenders
    assert (own.name, {c.name for c in peers}) == (OWN, set(names))
    for specs in (specs for c in peers for specs in c.programs.values()):
        assert specs
        for blocks in ("forward", "backward", "backward_dq"):
            sizes = {n for spec in specs for n in spec.kwargs.get(blocks, ())}
            assert all(seq % n == 0 for n in sizes)
