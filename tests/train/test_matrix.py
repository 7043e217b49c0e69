"""docs/parallelism.md has the parity matrix as it is, and what it tells a reader to
write works.

``python -m tests.train.test_matrix`` writes the matrix into it, between its markers.
"""

import re
from functools import cache
from pathlib import Path

import jax
import pytest
import yaml

from maxlm.config.load import load_config
from maxlm.plan.layout import compute_run_layout
from maxlm.run.config import RunConfig
from maxlm.sharding import MESH_AXES, mesh_sizes
from tests.train import cells

PAGE = Path(__file__).parents[2] / "docs/parallelism.md"
BEGIN = "<!-- matrix: python -m tests.train.test_matrix -->\n"
END = "<!-- end of matrix -->\n"
COLUMNS = {
    "mha": "dense MHA",
    "gqa_window": "GQA, window",
    "moe": "MoE",
    cells.CAPACITY: "MoE, capacity",
    cells.PATTERN: "alternating windows",
    cells.LATENT: "MLA, MoE",
    cells.KINDS: "kinds by turns",
    cells.GATED: "gates, chunks",
    cells.SPARSE: "sparse",
    cells.NARROW: "narrow values",
    cells.MAMBA: "Mamba",
    cells.DELTA: "delta rules",
    cells.HYBRID: "Mamba-2, other states",
    cells.STREAMS: "hyper-connections",
    cells.SHARED: "shared blocks",
}
DEVICES = 64
# Each block of YAML, and what a plan is to say of it.
EXAMPLES = re.findall(
    r"```yaml\n(.*?)```\n(?:<!-- not run: .*? -->\n```text\n(.*?)```\n)?",
    PAGE.read_text(),
    re.DOTALL,
)


@cache
def find_refusal(model: str, layout: str) -> str | None:
    """Returns why a layout of a model is refused; None: it is not."""
    return cells.refusal(model, cells.CELLS[layout])


def table() -> str:
    """Markdown: a row for each layout, a column for each model, and reasons below."""
    reasons: list[str] = []

    def mesh(cell: cells.Cell) -> str:
        return " ".join(
            f"{axis}={cell.mesh[axis]}"
            for axis in MESH_AXES
            if cell.mesh.get(axis, 1) > 1
        )

    def entry(name: str, model: str) -> str:
        if model not in cells.CELLS[name].models:
            return ""
        reason = find_refusal(model, name)
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
        hosts = (
            COLUMNS[cells.HOST_CELLS[name].models[0]]
            if name in cells.HOST_CELLS
            else ""
        )
        lines.append(f"| {name} | {mesh(cell)} | {entries} | {hosts} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


@pytest.mark.heavy
def test_the_page_shows_which_layouts_are_refused_and_why():
    page = PAGE.read_text()
    compiled = list[str]()
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda name, *_, **__: compiled.append(name) if "compile" in name else None)
    assert page == written(page), "run: python -m tests.train.test_matrix"
    assert not compiled
    refused = {
        (layout, model)
        for layout, model in cells.PAIRS
        if find_refusal(model, layout) is not None
    }
    assert refused == set(cells.PAIRS) - set(cells.TRAINED)


@pytest.mark.parametrize(
    ("settings", "says"), EXAMPLES, ids=[e[0].split("\n")[0] for e in EXAMPLES]
)
def test_what_the_page_tells_to_write_is_planned_as_it_says(settings, says, tmp_path):
    example = yaml.safe_load(settings)
    data = {"batch_size": DEVICES * example.get("train", {}).get("micro_batches", 1)}
    run = {"include": "llama3_8b", **example, "data": data | example.get("data", {})}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    config = load_config(RunConfig, file).value
    notes = compute_run_layout(config, mesh_sizes(config.mesh, DEVICES)).notes
    assert set(says.splitlines()) <= set(notes), notes


def test_there_are_examples():
    assert len(EXAMPLES) == 10
    assert sum(bool(says) for _, says in EXAMPLES) == 8


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    PAGE.write_text(written(PAGE.read_text()))
