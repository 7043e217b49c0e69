"""Attention's figures as one Markdown table, with what misses the goal or has no
figure."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.kernel_cycles.contests.contest import OWN, Outcome, Row, best_peer
from benchmarks.kernel_cycles.contests.survey import ContestCell, Results
from benchmarks.kernel_cycles.static.problems import Shape

GOAL = 0.90
"""Of the best peer's time."""
_NONE = "—"
_SHORT_NAMES = {
    "jax splash": "splash",
    "jax flash": "flash",
    "tokamax splash": "tokamax",
}
_FORWARD, _BACKWARD = "forward", "backward"


def table(results: Results) -> str:
    """For each shape a row of ours, in brackets the ratio to the best peer, and one of
    this peer.

    Spills are stores in our inner loops, forward and backward. Memory is of HBM, of
    forward and backward pass in one program: ours, and the least of the peers', each at
    its fastest blocks.
    """
    chips = list(dict.fromkeys(cell.chip for cell in results))
    peers = any(_peers(outcomes) for outcomes in results.values())
    columns = [
        title
        for chip in chips
        for title in (f"{chip} forward", "backward", "spills", "temp MB")
    ]
    lines = [
        _line(["head, sequence, mask", "µs", *columns]),
        "|---" * (2 + len(columns)) + "|",
    ]
    for shape in dict.fromkeys(cell.shape for cell in results):
        name = f"{shape.head_dim} {shape.seq:,} {shape.mask}"
        lines.append(_line([name, "ours", *_cells(_ours, results, shape, chips)]))
        if peers:
            lines.append(
                _line(["", "best peer", *_cells(_theirs, results, shape, chips)])
            )
    lines += ["", *_misses(results)] if peers else []
    if reasons := list(_reasons(results)):
        lines += ["", f"Why {_NONE}:", "", *reasons]
    return "\n".join(lines)


def _cells(of, results: Results, shape: Shape, chips: Sequence[str]) -> list[str]:
    cells = []
    for chip in chips:
        passes = [
            results[ContestCell(shape, chip, direction)]
            for direction in (_FORWARD, _BACKWARD)
        ]
        cells += of(*passes)
    return cells


def _ours(forward: Mapping[str, Outcome], backward: Mapping[str, Outcome]) -> list[str]:
    rows = [_own(forward), _own(backward)]
    times = []
    for row, outcomes in zip(rows, (forward, backward), strict=True):
        share = ratio(outcomes)
        behind = "" if share is None else f" ({share:.2f})"
        times.append(f"{_figure(row.microseconds)}{behind}" if row else _NONE)
    spills = "/".join(f"{row.spill_stores:,}" if row else _NONE for row in rows)
    return [*times, spills, _megabytes(rows[1].costs.temp_bytes) if rows[1] else _NONE]


def _theirs(
    forward: Mapping[str, Outcome], backward: Mapping[str, Outcome]
) -> list[str]:
    times = []
    for outcomes in (forward, backward):
        row = best_peer(outcomes)
        name = row and _SHORT_NAMES.get(row.contender.name, row.contender.name)
        times.append(f"{_figure(row.microseconds)} {name}" if row else _NONE)
    temps = [
        row.costs.temp_bytes
        for row in _peers(backward).values()
        if isinstance(row, Row)
    ]
    return [*times, "", _megabytes(min(temps)) if temps else _NONE]


def _peers(outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    return {name: outcome for name, outcome in outcomes.items() if name != OWN}


def _own(outcomes: Mapping[str, Outcome]) -> Row | None:
    outcome = outcomes[OWN]
    return outcome if isinstance(outcome, Row) else None


def ratio(outcomes: Mapping[str, Outcome]) -> float | None:
    """Of our time to the best peer's; None where one is missing."""
    our_row = _own(outcomes)
    best_row = best_peer(outcomes)
    return (
        our_row.microseconds / best_row.microseconds if our_row and best_row else None
    )


def _misses(results: Results) -> Iterator[str]:
    shares = {cell: ratio(outcomes) for cell, outcomes in results.items()}
    missed = {
        cell: share for cell, share in shares.items() if share is None or share > GOAL
    }
    met = len(shares) - len(missed)
    yield f"{met} of {len(shares)} ratios are at most {GOAL:.2f}" + (
        ", all but" if missed else "."
    )
    if missed:
        yield ""
    for cell, share in missed.items():
        yield f"- {cell}: {_NONE if share is None else f'{share:.3f}'}"


def _reasons(results: Results) -> Iterator[str]:
    for cell, outcomes in results.items():
        for name, outcome in outcomes.items():
            if not isinstance(outcome, Row):
                first = (str(outcome).splitlines() or [type(outcome).__name__])[0]
                yield f"- {cell}, {name}: {first[:200]}"


def _figure(value: float) -> str:
    """Three or four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.{0 if size >= 1e8 else 1}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")
