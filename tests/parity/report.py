"""Measure every case again and write docs/families.md's table of errors:
``python -m tests.parity.report [CASE ...]``, all cases or, to be printed, some."""

import sys
from pathlib import Path

from tests.parity import measure

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MARKERS = ("<!-- errors -->\n", "<!-- /errors -->\n")
HEAD = """\
| case | architecture | fp32 | float64 | rows shared | greedy |
|---|---|---:|---:|---:|:---:|
"""


def row(name: str) -> str:
    figures = [
        f"{of(name):.0e}" for of in (measure.single, measure.double, measure.packed)
    ]
    same = "–"
    if measure.generates(name):
        here, there = measure.continued(name)
        same = "equal" if here == there else "**different**"
    kind = measure.case(name).family.hf_architecture
    return f"| {' | '.join((name, f'`{kind}`', *figures, same))} |\n"


def main(names: tuple[str, ...]) -> None:
    rows = []
    for name in names or measure.CASES:
        rows.append(row(name))
        print(rows[-1], end="", flush=True)
    if names:
        return
    before, rest = PAGE.read_text().split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    PAGE.write_text(before + MARKERS[0] + HEAD + "".join(rows) + MARKERS[1] + after)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
