"""docs/extending.md: each example is code of the test that its subject's row names, needs
no other import than its own, and every registry has the group that the table gives."""

import ast
import builtins
import importlib
import re
import symtable
import sys
from pathlib import Path
from types import ModuleType

import pytest

from maxlm.adapters import ADAPTERS
from maxlm.config.registry import Registry
from maxlm.corpus.stages import STAGES
from maxlm.data.documents.files import DOCUMENT_READERS
from maxlm.huggingface.families import FAMILIES
from maxlm.launch.schedulers import SCHEDULERS
from maxlm.models.architectures import ARCHITECTURES
from maxlm.models.blocks import FEED_FORWARDS, MIXERS
from maxlm.models.caches.config import CACHES
from maxlm.models.frontends import FRONTENDS
from maxlm.optim.config import OPTIMIZERS
from maxlm.tasks import TASKS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/extending.md").read_text()
REGISTRIES = (
    *(ARCHITECTURES, MIXERS, FEED_FORWARDS, CACHES, FRONTENDS, TASKS, ADAPTERS),
    *(FAMILIES, OPTIMIZERS, STAGES, SCHEDULERS, DOCUMENT_READERS),
)
ROW = re.compile(
    r"^\| \[.*\]\(#(?P<anchor>.*)\) \| `(?P<registry>.*)` \| .* \| "
    r"`(?P<group>.*)` \| `(?P<test>.*)` \|$",
    re.MULTILINE,
)
ROWS = [row.groupdict() for row in ROW.finditer(TEXT)]
SECTIONS = re.findall(r"^## (.*)\n(?:.*\n)*?```python\n((?:.*\n)*?)```$", TEXT, re.M)


def test_the_table_names_every_registry():
    registries: list[Registry] = []
    for row in ROWS:
        module, _, name = row["registry"].rpartition(".")
        registry = getattr(importlib.import_module(module), name)
        assert registry.group == row["group"]
        registries.append(registry)
    assert {id(registry) for registry in registries} == set(map(id, REGISTRIES))
    anchors = [title.lower().replace(" ", "-") for title, _ in SECTIONS]
    assert [row["anchor"] for row in ROWS] == anchors


def run_example(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Runs code as a module of its own, whose kinds are forgotten after the test."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, name, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(("title", "code"), SECTIONS)
def test_an_example_is_code_of_its_test_and_runs(title, code, monkeypatch):
    anchor = title.lower().replace(" ", "-")
    (test,) = [row["test"] for row in ROWS if row["anchor"] == anchor]
    tested = ast.parse((ROOT / test).read_text()).body
    statements = {ast.unparse(statement) for statement in tested}
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        assert ast.unparse(statement) in statements, ast.unparse(statement)
    module = run_example("extending_example", code, monkeypatch)
    for name in list_free_names(code):
        assert hasattr(module, name) or hasattr(builtins, name), name


def list_free_names(code: str) -> set[str]:
    """Lists the names that functions of a module take from it or from Python, which
    defining a function does not look up."""
    names: set[str] = set()
    tables = [symtable.symtable(code, "example", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            # What a function does not bind, and no function around it either.
            if symbol.is_global() and symbol.is_referenced():
                names.add(symbol.get_name())
    return names


def test_the_first_example_runs(monkeypatch):
    code = re.findall(r"```python\n((?:.*\n)*?)```\n", TEXT)[0]
    run_example("first_example", code, monkeypatch)
