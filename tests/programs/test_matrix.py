"""docs/parallelism.md says what the tests try, and what it tells a reader to write works."""

import re

import pytest
import yaml

from maxlm.config import load_config
from maxlm.plan.layout import lay_out_run
from maxlm.run import RunConfig
from maxlm.sharding import mesh_sizes
from tests.programs.matrix import PAGE, written

DEVICES = 64
# Each block of YAML, and what a plan is to say of it.
EXAMPLES = re.findall(r"```yaml\n(.*?)```\n(?:```text\n(.*?)```\n)?", PAGE.read_text(), re.DOTALL)


def test_the_page_shows_the_matrix_as_it_is():
    page = PAGE.read_text()
    assert page == written(page), "run: python -m tests.programs.matrix"


@pytest.mark.parametrize(
    ("settings", "says"), EXAMPLES, ids=[e[0].split("\n")[0] for e in EXAMPLES]
)
def test_what_the_page_tells_to_write_is_planned_as_it_says(settings, says, tmp_path):
    own = yaml.safe_load(settings)
    data = {"batch_size": DEVICES * own.get("train", {}).get("micro_batches", 1)}
    run = {"include": "llama3_8b", **own, "data": data | own.get("data", {})}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    config = load_config(RunConfig, file).value
    notes = lay_out_run(config, mesh_sizes(config.mesh, DEVICES)).notes
    assert set(says.splitlines()) <= set(notes), notes


def test_there_are_examples():
    assert len(EXAMPLES) == 10
    assert sum(bool(says) for _, says in EXAMPLES) == 8
