"""Promise: ``maxlm config`` prints what a run resolves to, its schema and the shipped
names."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from maxlm.config.registry import Registry
from tests.train import tiny

DOCS = Path(__file__).parents[2] / "docs"


def test_show(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("include: demo\nmodel:\n  d_model: 16\n")
    code, out, err = run("config", "show", "mine.yaml", "name=y")
    assert (code, err) == (0, "")
    lines = [re.split(" +# ", line.strip()) for line in out.splitlines()]
    assert ["d_model: 16", "mine.yaml:3"] in lines
    assert ["name: y", "command line"] in lines


def test_schemas_describe_every_setting(run):
    runs = json.loads(run("config", "schema").out)
    assert list(runs["properties"])[:2] == ["include", "name"]
    kinds = set()
    for model in json.loads(run("config", "schema", "--recipe").out)["$defs"].values():
        kinds.add(model.get("properties", {}).get("stage", {}).get("const"))
    assert {"url", "extract", "near", "substring", "pii"} <= kinds


def test_list(run):
    names = run("config", "list").out.splitlines()
    assert {"runs/demo", "models/llama3_8b"} <= {*names}


@pytest.mark.parametrize("name", ["settings.md", "recipe.md", "api.md"])
def test_a_page_made_from_the_code_is_what_the_code_says(name, monkeypatch):
    # Kinds that other tests register, as packages do, are on no page.
    monkeypatch.setattr(Registry, "kinds", Registry.builtin_kinds)
    pages = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
    assert (DOCS / name).read_text() == pages[name], "write it anew: make docs"


@pytest.mark.more
def test_the_tables_of_families_are_what_the_presets_say(monkeypatch):
    monkeypatch.setattr(Registry, "kinds", Registry.builtin_kinds)
    monkeypatch.syspath_prepend(DOCS)
    page = runpy.run_path(str(DOCS / "generate.py"))["families_page"]()
    assert (DOCS / "families.md").read_text() == page, "write it anew: make docs"


@pytest.mark.more
def test_the_example_of_the_api_runs(tmp_path):
    """A model is trained, saved, loaded and asked to continue a text."""
    code = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)[
        0
    ]
    environment = tiny.environment(tmp_path) | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    out = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert [
        words in out for words in ("fits: True", "'bits_per_byte': ", "Document")
    ] == [True] * 3
