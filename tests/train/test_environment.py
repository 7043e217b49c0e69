"""What a run was trained with: beside what git, pip and the operating system say."""

import json
import socket
import subprocess
from importlib.metadata import version

import jax
import psutil
import pytest

from maxlm.train.run_folder import (
    describe_environment,
    get_process_start_unix_seconds,
    read_git_state,
)


def test_what_is_here(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_some_flag")
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    environment = describe_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["versions"]["orbax-checkpoint"] == version("orbax-checkpoint")
    assert environment["devices"] == {"kind": jax.devices()[0].device_kind, "count": 8}
    assert (environment["processes"], environment["hosts"]) == (
        1,
        [socket.gethostname()],
    )
    assert environment["variables"]["SLURM_JOB_ID"] == "4711"
    assert environment["variables"]["LIBTPU_INIT_ARGS"] == "--xla_some_flag"
    assert "s3cret" not in json.dumps(environment)


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_state_of_a_checkout(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project's")
    (tmp_path / "maxlm").mkdir()
    module = tmp_path / "maxlm" / "__init__.py"
    module.write_text("one\n")
    # Inside of another project's checkout, which does not track it.
    assert read_git_state(tmp_path) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert read_git_state(tmp_path) == {"commit": commit, "dirty": False}
    module.write_text("two\n")
    assert read_git_state(tmp_path) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_git_state(tmp_path) is None


def test_a_process_knows_when_it_was_started():
    """Not when it got round to asking."""
    want = psutil.Process().create_time()
    assert get_process_start_unix_seconds() == pytest.approx(want, abs=1.5)
