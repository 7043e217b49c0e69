"""Promise: each test is run by one of make's targets, so that no marker and no folder
takes it out of all of them."""

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each file's tests are in one of these; `test-fast` is a part of `test`.
DISJOINT = ("test", "test-more", "test-corpus", "test-parity", "test-aot")
DISJOINT += ("test-browser", "test-cluster")
# Whatever they run beside, they run what is marked slow.
SLOW = ("test-layouts", "torture")
# Every mark or pair of marks that changes where a test runs.
MARKS = ((), ("heavy",), ("more",), ("heavy", "more"))


@dataclass(frozen=True)
class Command:
    """The pytest command of a target: paths (none: all), paths left out, and an
    expression of markers."""

    paths: tuple[str, ...]
    ignored: tuple[str, ...]
    expression: str

    @classmethod
    def read(cls, target: str) -> "Command":
        """What make would run. Touches nothing."""
        command = ["make", "--dry-run", "--no-print-directory", target]
        recipe = subprocess.check_output(command, cwd=ROOT, text=True)
        line = next(line for line in recipe.splitlines() if " -m pytest " in line)
        arguments = shlex.split(line.partition(" -m pytest ")[2])
        ignored = [
            argument.removeprefix("--ignore=")
            for argument in arguments
            if argument.startswith("--ignore=")
        ]
        paths = [argument for argument in arguments if argument.startswith("tests/")]
        expression = "True"
        if "-m" in arguments:
            expression = arguments[arguments.index("-m") + 1]
        return cls(tuple(paths), tuple(ignored), expression)

    def takes(self, path: str, marks: tuple[str, ...] = ()) -> bool:
        """Whether it runs a file's tests that have these marks."""
        if self.paths and not is_in(path, self.paths):
            return False
        if is_in(path, self.ignored):
            return False
        # The operators of pytest's expressions are Python's.
        values = {mark: mark in marks for mark in ("heavy", "more", "slow")}
        return bool(eval(self.expression, {}, values))


def is_in(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


@pytest.fixture(scope="module")
def commands() -> dict[str, Command]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return {target: Command.read(target) for target in ("test-fast", *DISJOINT, *SLOW)}


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """Each file of tests: its path from the root, and its text."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def test_each_test_is_in_one_target(commands, files):
    for path in files:
        for marks in MARKS:
            targets = [name for name in DISJOINT if commands[name].takes(path, marks)]
            assert len(targets) == 1, (path, marks, targets)


def test_slow_tests_are_in_targets_of_their_own(commands, files):
    slow = {path for path, text in files.items() if "mark.slow" in text}
    assert slow
    for path in slow - {"tests/test_targets.py"}:
        assert any(commands[name].takes(path, ("slow",)) for name in SLOW), path
        assert not commands["test"].takes(path, ("slow",))
        assert not commands["test-more"].takes(path, ("slow", "more"))


def test_the_fast_ones_are_a_part_of_the_suite(commands, files):
    for path in files:
        if commands["test"].takes(path):
            assert commands["test-fast"].takes(path), path
        else:
            assert not commands["test-fast"].takes(path), path
        assert not commands["test-fast"].takes(path, ("heavy",))


def test_ci_runs_what_a_change_must_pass():
    script = (ROOT / ".ci/run").read_text()
    targets = re.findall(r"\bmake ([\w-]+)", script)
    assert {"check", "test", "test-more", "test-corpus", "test-cluster"} <= {*targets}
