"""What a run was trained with: beside what git, pip and the operating system say."""

import json
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import version

import jax

from maxlm.programs.environment import describe_environment, read_git_state
from tests.ports import free_port
from tests.programs import tiny


def test_what_is_here(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_some_flag")
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    found = describe_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["orbax-checkpoint"] == version("orbax-checkpoint")
    assert found["devices"] == {"kind": jax.devices()[0].device_kind, "count": 8}
    assert (found["processes"], found["hosts"]) == (1, [socket.gethostname()])
    assert found["variables"]["SLURM_JOB_ID"] == "4711"
    assert found["variables"]["LIBTPU_INIT_ARGS"] == "--xla_some_flag"
    assert "s3cret" not in json.dumps(found)


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
    assert read_git_state(tmp_path) == {"commit": commit, "dirty": False, "diff_bytes": 0}
    (tmp_path / "untracked").write_text("")
    assert read_git_state(tmp_path) == {"commit": commit, "dirty": True, "diff_bytes": 0}
    # Nothing is written: git would note that a file is what it was, and lock its index for it.
    os.utime(module, (1, 1))
    index = (tmp_path / ".git" / "index").read_bytes()
    assert read_git_state(tmp_path)["diff_bytes"] == 0
    assert (tmp_path / ".git" / "index").read_bytes() == index
    module.write_text("two\n")
    size = len(git(tmp_path, "diff", "HEAD"))
    assert size > 50
    assert read_git_state(tmp_path) == {"commit": commit, "dirty": True, "diff_bytes": size}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_git_state(tmp_path) is None


def test_a_process_knows_when_it_was_started():
    """Not when it got round to asking."""
    code = (
        "import time; time.sleep(1)\n"
        "from maxlm.programs.environment import get_process_start\nprint(get_process_start())"
    )
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert before - 0.05 <= float(done.stdout) <= time.time() - 1


PROCESS = """
import sys, jax
import platform
host = f"host-{sys.argv[2]}"
platform.node = lambda: host
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from maxlm.programs.environment import describe_environment
found = describe_environment()
print(found["processes"], *found["hosts"], found["devices"]["count"])
"""


def test_all_hosts_are_named(tmp_path):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env=tiny.environment(tmp_path),
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [text.splitlines()[-1] for text in said] == [
        "2 host-0 host-1 2"
    ] * 2  # Gloo speaks before
