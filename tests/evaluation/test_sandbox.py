"""The sandbox: hostile programs do no harm and count as failed."""

import os
import socket
import time
from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.evaluation import sandbox
from maxlm.evaluation.sandbox import (
    SandboxLimits,
    detect_isolation,
    run_all,
    run_command,
    run_python,
)

LIMITS = SandboxLimits(seconds=4, memory_bytes=256 << 20, processes=8, file_bytes=1 << 20)

# Programs that end as failed; {port}, {victim} and {pid} are of the test.
FAILING = {
    "assertion": "assert 1 == 2, 'no'",
    "exits with 0": "import os\nos._exit(0)",
    "exits with 0 by sys": "import sys\nsys.exit(0)",
    "hides its error": "import sys\nsys.excepthook = lambda *a: None\nraise SystemExit(0)",
    "replaces a builtin": "import builtins\nbuiltins.abs = lambda x: 7\nassert abs(-3) == 7",
    "replaces os.write": "import os\nos.write = lambda *a: 0\nos._exit(0)",
    "closes every descriptor": "import os\nos.closerange(0, 100)",
    "reads input": "input()",
    "does not compile": "def f(:",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "deletes a file": "import os\nos.remove({victim!r})",
    "deletes a folder": "import os, shutil\nshutil.rmtree(os.path.dirname({victim!r}))",
    "changes a file": "open({victim!r}, 'w').write('gone')",
    "writes to the system": "open('/usr/maxlm_was_here', 'w')",
    "reads a secret": "open({victim!r}).read()",
    "writes a huge file": "f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\nwhile True: pass",
    "kills a process": "import os\nos.kill({pid}, 9)",
    "kills all": "import os\nos.kill(-1, 9)\nos._exit(0)",
    "leaves children": """
import os, sys, time
for _ in range(3):
    if os.fork() == 0:
        try:
            os.setsid()
        except OSError:
            pass
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-Sc", "import time; time.sleep({marker})"])
        os._exit(0)
time.sleep(0.5)
os._exit(0)
""",
}
CAPABILITIES = """
import ctypes
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget(header, data) == 0
assert not any(data), "it has privileges"
"""
FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


@pytest.fixture(autouse=True)
def isolation() -> str:
    """Without isolation hostile programs are not run."""
    if detect_isolation() == "limits":
        pytest.skip("this machine isolates nothing but by limits")
    return detect_isolation()


def find_processes(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if marker in text:
            found.append(text)
    return found


@pytest.fixture
def victim(tmp_path) -> Path:
    path = tmp_path / "folder" / "precious"
    path.parent.mkdir()
    path.write_text("here")
    for each in (path, *list(path.parents)[:3]):  # File permissions alone protect nothing.
        each.chmod(0o777)
    return path


@pytest.mark.parametrize("name", FAILING)
def test_hostile_program_fails_and_does_no_harm(name, victim):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        marker = f"60.{time.time_ns()}"
        values = {"{port}": str(listener.getsockname()[1]), "{victim!r}": repr(str(victim))}
        values |= {"{pid}": str(os.getpid()), "{marker}": marker}
        program = FAILING[name]
        for key, value in values.items():
            program = program.replace(key, value)
        result = run_python(program, LIMITS)
        assert not result.passed, result
        with pytest.raises(TimeoutError):
            listener.accept()
    assert victim.read_text() == "here"
    assert not find_processes(marker)


def test_endless_programs_end():
    """Loops, sleep, a fork bomb within its limit, memory, output, many files."""
    programs = {
        "loop": ("while True: pass", "timed_out", "longer than 1.5 s"),
        "sleep": ("import time\ntime.sleep(50)", "timed_out", "longer than 1.5 s"),
        "bomb": (FORK_BOMB, "timed_out", "longer than 1.5 s"),
        "memory": ("x = []\nwhile True: x.append(bytes(1 << 24))", "out_of_memory", "MemoryError"),
        "noise": ("while True: print('noise' * 1000)", "failed", ""),
        "files": (
            "for i in range(64): open(str(i), 'wb').write(bytes(1 << 16))",
            "failed",
            "OSError: [Errno 28] No space left on device",
        ),
    }
    limits = SandboxLimits(1.5, 256 << 20, processes=8, file_bytes=1 << 20, output_bytes=1000)
    results = run_all([program for program, _, _ in programs.values()], limits, workers=3)
    for (_, status, message), result in zip(programs.values(), results, strict=True):
        assert (result.status, result.message[: len(message)]) == (status, message)
        assert len(result.output) <= 1000
    assert run_python("assert sum([1, 2]) == 3", LIMITS).passed


def test_fork_bomb_has_few_processes():
    count = FORK_BOMB.replace("pass", "print(os.getpid()); os._exit(0)")
    numbers = run_python(count, SandboxLimits(seconds=20, processes=8)).output.split()
    assert 1 <= len(set(numbers)) <= 8


def test_harmless_programs_pass(monkeypatch):
    """What solutions may do: write and read files, start threads and processes, import packages,
    be big, print, define classes that pickle."""
    programs = [
        "",
        "open('a', 'w').write('b')\nassert open('a').read() == 'b'",
        "import os\nassert os.listdir('.') == []",
        "import sys, os\nassert 'MAXLM_TEST' not in os.environ and sys.stdin.read() == ''",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import subprocess\nassert subprocess.run(['/bin/echo', 'x'], capture_output=True).stdout",
        "import numpy as np\nassert np.arange(4).sum() == 6",
        "x = '" + "y" * 300_000 + "'\nprint(x)",
        "import pickle\nclass A: pass\nassert isinstance(pickle.loads(pickle.dumps(A())), A)",
        "if __name__ == '__main__': raise RuntimeError('not as in the reference harness')",
        "assert 'é😀' == '\\u00e9\\U0001f600'",
        CAPABILITIES,
        "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
    ]
    monkeypatch.setenv("MAXLM_TEST", "1")
    results = run_all(programs, SandboxLimits(seconds=60))
    assert [result.message for result in results if not result.passed] == []


def test_message_is_the_errors_last_line():
    [result] = run_all(["print('before')\nraise ValueError('two\\nlines')"])
    assert (result.status, result.message) == ("failed", "lines")
    assert "ValueError: two" in result.output
    [result] = run_all(["print('last words')\n{}['key']"])
    assert result.message == "KeyError: 'key'"


def test_results_are_in_order():
    programs = [f"assert {number} % 3" for number in range(7)]
    assert [result.passed for result in run_all(programs, workers=3)] == [
        number % 3 > 0 for number in range(7)
    ]


def test_command_changes_its_folder_and_nothing_else(tmp_path):
    work, other = tmp_path / "work", tmp_path / "other"
    for folder in (work, other):
        folder.mkdir()
        (folder / "file").write_text("old")
    script = f"pwd; echo new > file; cat {other}/file; echo new > {other}/file"
    command = ["/bin/sh", "-c", script]
    result = run_command(command, LIMITS, folder=work, readable=[other])
    assert not result.passed
    assert result.output.startswith(f"{work}\nold")
    assert (work / "file").read_text() == "new\n"
    assert (other / "file").read_text() == "old"


def test_without_tools_a_warning_names_what_is_open(monkeypatch):
    def deny(program, limits, layer):
        if layer != "limits":
            raise MaxlmError("denied")

    monkeypatch.setattr(sandbox, "run_python", deny)
    with pytest.warns(UserWarning, match="not isolated: the network"):
        assert detect_isolation.__wrapped__() == "limits"


def test_program_that_cannot_be_started_is_no_failure():
    with pytest.raises(MaxlmError, match="cannot be run"):
        run_python("", SandboxLimits(memory_bytes=1 << 20))
