"""Measure cases again and write their rows of docs/families.md's table of errors:
``python -m tests.parity.report [CASE ...]``, all cases or, beside the rows that are
there, some."""

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


def replace_rows(page: str, rows: dict[str, str]) -> str:
    """Returns the page with these rows, by case, in place of those in its table or
    beside them, in the order of the cases."""
    before, rest = page.split(MARKERS[0])
    table, after = rest.split(MARKERS[1])
    lines = table.removeprefix(HEAD).splitlines(keepends=True)
    by_case = {line.split("|")[1].strip(): line for line in lines}
    by_case |= rows
    written = "".join(by_case[name] for name in measure.CASES if name in by_case)
    return before + MARKERS[0] + HEAD + written + MARKERS[1] + after


def main(names: tuple[str, ...]) -> None:
    unknown = sorted(set(names) - set(measure.CASES))
    if unknown:
        sys.exit(f"no such case: {', '.join(unknown)}; see tests/parity/cases.yaml")
    rows = {}
    for name in names or measure.CASES:
        rows[name] = row(name)
        print(rows[name], end="", flush=True)
    # Read only now: cases may be measured by several processes.
    PAGE.write_text(replace_rows(PAGE.read_text(), rows))


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
