"""Promise: ``maxlm config`` prints what a run resolves to, its schema and the shipped names."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from maxlm.cli.main import main
from maxlm.config import Config

DOCS = Path(__file__).parents[2] / "docs"


class Model(Config):
    d_model: int = 8
    """Channels."""


class RunConfig(Config):
    model: Model = Model()
    name: str = "x"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs ``maxlm config ARGUMENTS`` with a small RunConfig in an empty folder."""
    module = ModuleType("maxlm.run")
    module.RunConfig = RunConfig  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "maxlm.run", module)
    monkeypatch.delenv("MAXLM_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("model:\n  d_model: 16\n")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["config", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def test_show(run):
    assert run("show", "mine.yaml", "name=[a]") == (
        2,
        "",
        "error: command line: name must be text, not ['a']\n",
    )
    code, out, err = run("show", "mine.yaml", "name=y")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "model:",
        "  d_model: 16  # mine.yaml:2",
        "name: y        # command line",
    ]


def test_schema(run):
    code, out, _ = run("schema")
    assert code == 0
    body = json.loads(out)
    assert list(body["properties"]) == ["include", "model", "name"]
    assert body["$defs"]["Model"]["properties"]["d_model"]["description"] == "Channels."


def test_list(run, monkeypatch):
    monkeypatch.setattr("maxlm.config.list_shipped_configs", lambda: ["runs/demo", "models/tiny"])
    assert run("list") == (0, "runs/demo\nmodels/tiny\n", "")


def test_the_schema_of_recipes_has_every_stage(capsys):
    assert main(["config", "schema", "--recipe"]) == 0
    schema = json.loads(capsys.readouterr().out)
    kinds = {
        d["properties"]["stage"].get("const")
        for d in schema["$defs"].values()
        if "stage" in d.get("properties", {})
    }
    assert {"url", "extract", "near", "substring", "pii"} <= kinds


@pytest.mark.parametrize("name", ["settings.md", "recipe.md", "api.md"])
def test_a_page_made_from_the_code_is_what_the_code_says(name):
    pages = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
    assert (DOCS / name).read_text() == pages[name], "write it anew: make docs"


def test_the_example_of_the_api_runs(tmp_path):
    """15 s of CPU: a model is trained, saved, loaded and asked to continue a text."""
    code = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)[0]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment = {**os.environ, **flags, "HOME": str(tmp_path), "PYTHONPATH": str(DOCS.parent)}
    command = {"args": [sys.executable, "-c", code], "cwd": tmp_path, "env": environment}
    out = subprocess.check_output(**command, text=True)
    assert [words in out for words in ("fits: True", "'bits_per_byte': ", "Document")] == [True] * 3
