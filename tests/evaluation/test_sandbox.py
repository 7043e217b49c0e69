"""The sandbox: hostile programs do no harm and count as failed; harmless ones pass."""

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
    run_python,
)

LIMITS = SandboxLimits(
    seconds=4, memory_bytes=256 << 20, processes=8, file_bytes=1 << 20
)

# Programs that end as failed; {port}, {victim}, {pid} and {marker} are of the test.
FAILING = {
    "exits with 0": "import os\nos._exit(0)",
    "hides its error": "import sys\nsys.excepthook = lambda *a: None\nraise "
    "SystemExit(0)",
    "replaces a builtin": "import builtins\nbuiltins.abs = lambda x: 7\nassert abs(-3) "
    "== 7",
    "closes every descriptor": "import os\nos.closerange(0, 10_000)",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "deletes a folder": "import os, shutil\nshutil.rmtree(os.path.dirname('{victim}'))",
    "changes a file": "open('{victim}', 'w').write('gone')",
    "reads a secret": "open('{victim}').read()",
    "writes to the system": "open('/usr/maxlm_was_here', 'w')",
    "writes a huge file": "f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "writes many files": "for i in range(64): open(str(i), 'wb').write(bytes(1 << 16))",
    "mounts": "import subprocess\nsubprocess.check_call(['mount', '-o', 'remount,rw', "
    "'/usr'])",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\nos._exit(0)",
    "kills a process": "import os\nos.kill({pid}, 9)",
    "kills all": "import os\nos.kill(-1, 9)\nos._exit(0)",
    "leaves children": """
import os, sys, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-Sc", "import time; time.sleep({marker})"])
        os._exit(0)
time.sleep(0.5)
os._exit(0)
""",
}
FORK_BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""
FEW_PROCESSES = """
import os, time
for count in range(100):
    try:
        if os.fork() == 0: time.sleep(60)
    except OSError: break
assert 1 <= count < 32
"""
NO_CAPABILITIES = "assert 'CapEff:\\t' + 16 * '0' in open('/proc/self/status').read()"


@pytest.fixture(autouse=True)
def isolation() -> None:
    if detect_isolation() == "limits":
        pytest.skip("this machine isolates nothing but by limits")


def count_processes(marker: str) -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += marker in path.read_text()
        except OSError:
            continue
    return count


@pytest.mark.parametrize("name", FAILING)
def test_hostile_program_fails_and_does_no_harm(name, tmp_path):
    victim = tmp_path / "folder" / "precious"
    marker = f"60.{time.time_ns()}"
    victim.parent.mkdir()
    victim.write_text("here")
    for attack in (
        victim,
        *list(victim.parents)[:3],
    ):  # File permissions alone protect nothing.
        attack.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        values = {
            "port": listener.getsockname()[1],
            "victim": victim,
            "pid": os.getpid(),
        }
        program = FAILING[name]
        for key, value in (values | {"marker": marker}).items():
            program = program.replace(f"{{{key}}}", str(value))
        assert run_python(program, LIMITS).status == "failed"
        with pytest.raises(TimeoutError):
            listener.accept()
    assert victim.read_text() == "here"
    assert not count_processes(marker)


@pytest.mark.heavy
def test_endless_programs_end():
    programs = {
        "while True: pass": ("timed_out", "longer than 1.5 s"),
        "import time\ntime.sleep(50)": ("timed_out", "longer than 1.5 s"),
        FORK_BOMB: ("timed_out", "longer than 1.5 s"),
        "x = []\nwhile True: x.append(bytes(1 << 24))": ("out_of_memory", ""),
        "while True: print('noise' * 1000)": ("failed", ""),
    }
    limits = SandboxLimits(
        1.5, 256 << 20, processes=8, file_bytes=1 << 20, output_bytes=1000
    )
    results = run_all([*programs], limits, workers=3)
    for (status, message), result in zip(programs.values(), results, strict=True):
        assert (result.status, result.message[: len(message)]) == (status, message)
        assert len(result.output) <= 1000


def test_harmless_programs_pass(monkeypatch):
    """What solutions may do: write and read files, start threads and processes, import
    packages, be big, print, define classes that pickle; without privileges and the
    environment."""
    programs = [
        "",
        "open('a', 'w').write('b')\nassert open('a').read() == 'b'",
        "import os\nassert os.listdir('.') == []",
        "import sys, os\nassert 'MAXLM_TEST' not in os.environ and sys.stdin.read() == "
        "''",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import subprocess\nassert subprocess.run(['/bin/echo', 'x'], "
        "capture_output=True).stdout",
        "import numpy as np\nassert np.arange(4).sum() == 6",
        "x = '" + "y" * 300_000 + "'\nprint(x)",
        "import pickle\nclass A: pass\nassert "
        "isinstance(pickle.loads(pickle.dumps(A())), A)",
        "if __name__ == '__main__': raise RuntimeError('not as in the reference "
        "harness')",
        "assert 'é😀' == '\\u00e9\\U0001f600'",
        "import multiprocessing as m\nassert m.Pool(2).map(abs, [-1, 2]) == [1, 2]",
        FEW_PROCESSES,
        NO_CAPABILITIES,
    ]
    monkeypatch.setenv("MAXLM_TEST", "1")
    results = run_all(programs, SandboxLimits(seconds=60))
    assert [result.message for result in results if not result.passed] == []


def test_results_are_in_order_with_the_errors_last_line():
    programs = [
        "print('before')\nraise ValueError('two\\nlines')",
        "",
        "print('x')\n{}['key']",
    ]
    results = run_all(programs, workers=3)
    assert [result.message for result in results] == ["lines", "", "KeyError: 'key'"]
    assert "ValueError: two" in results[0].output


def test_command_changes_its_folder_and_nothing_else(tmp_path):
    work, other = tmp_path / "a work", tmp_path / "other"
    for folder in (work, other):
        folder.mkdir()
        (folder / "file").write_text("old")
    script = f"pwd; echo new > file; cat {other}/file; echo new > {other}/file"
    result = sandbox.run_command(
        ["/bin/sh", "-c", script], LIMITS, folder=work, readable=[other]
    )
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
    monkeypatch.undo()  # A program that cannot be started has not failed.
    with pytest.raises(MaxlmError, match="cannot be run"):
        run_python("", SandboxLimits(memory_bytes=1 << 20))
