"""The parity matrix as a table, from what the tests train and what they see refused.

``python -m tests.programs.matrix`` writes it into docs/parallelism.md, between its markers.
"""

from pathlib import Path

from maxlm.sharding import MESH_AXES
from tests.programs import cells

PAGE = Path(__file__).parents[2] / "docs/parallelism.md"
BEGIN, END = "<!-- matrix: python -m tests.programs.matrix -->\n", "<!-- end of matrix -->\n"
COLUMNS = {
    "mha": "dense MHA",
    "gqa_window": "GQA, window",
    "moe": "MoE",
    cells.CAPACITY: "MoE, capacity",
    cells.PATTERN: "windows by turns",
    cells.LATENT: "MLA, MoE",
}


def table() -> str:
    """Markdown: a row for each layout, a column for each model, and reasons below."""
    reasons: list[str] = []

    def mesh(cell: cells.Cell) -> str:
        return " ".join(
            f"{axis}={cell.mesh[axis]}" for axis in MESH_AXES if cell.mesh.get(axis, 1) > 1
        )

    def entry(name: str, model: str) -> str:
        if model not in cells.CELLS[name].models:
            return ""
        reason = cells.REFUSED.get(name, {}).get(model)
        if reason is None:
            return "✓"
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    lines = [
        f"| layout | mesh | {' | '.join(COLUMNS.values())} | 2 processes × 4 |",
        f"|---|---|{'---|' * len(COLUMNS)}---|",
    ]
    for name, cell in cells.CELLS.items():
        entries = " | ".join(entry(name, model) for model in COLUMNS)
        hosts = COLUMNS[cells.HOST_CELLS[name].models[0]] if name in cells.HOST_CELLS else ""
        lines.append(f"| {name} | {mesh(cell)} | {entries} | {hosts} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
