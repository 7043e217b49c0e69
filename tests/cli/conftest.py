"""The command line, called in this process."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from maxlm.cli.main import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd, monkeypatch) -> Callable[..., Outcome]:
    """Runs ``maxlm ARGUMENTS``."""
    monkeypatch.delenv("MAXLM_TRACEBACK", raising=False)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([*map(str, arguments)])
        return Outcome(code, *capfd.readouterr())

    return run


def read_content(folder: Path) -> dict[Path, bytes | None]:
    """Every file's bytes, and the names of folders."""
    paths = sorted(folder.rglob("*"))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def check_refused(run) -> Callable[..., None]:
    """Checks that a command is refused in one line, ``...`` for anything, and that it
    leaves what lies in a folder as it was."""

    def check(folder: Path, arguments: list[str], message: str) -> None:
        before = read_content(folder)
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        pattern = ".*".join(map(re.escape, f"error: {message}\n".split("...")))
        assert re.fullmatch(pattern, err, re.DOTALL), err
        assert read_content(folder) == before

    return check
