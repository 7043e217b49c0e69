"""Runs untrusted programs: a fresh process each, confined, limited, killed as a whole.

`detect_isolation` tries the layers, strongest first: namespaces with a root of their own; Landlock
and a seccomp filter, which containers allow as well; limits alone. A warning names what is open.
"""

import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from maxlm.config import MaxlmError
from maxlm.evaluation import isolation as isolation_script
from maxlm.runtime.pool import count_usable_cores

Layer = Literal["namespaces", "seccomp", "limits"]
_NOBODY = 65534
_NOT_ISOLATED = {
    "seccomp": "the size of all of a program's files, and how many processes root starts",
    "limits": "the network, files, other processes",
}
# The program runs in a module of its own, after which builtins must be as they were: a program that
# replaces `abs` passes the tests that call it. The token proves that its last line was reached.
_HARNESS = """
import builtins, os, sys
def run(write=os.write, table=vars(builtins)):
    token, _, program = sys.stdin.buffer.read().partition(b"\\n")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path.append(sys.argv[2])
    module = sys.modules["program"] = type(sys)("program")
    known = list(table.items())
    exec(compile(program, "program.py", "exec"), vars(module))
    for name, value in known:
        if table.get(name) is not value and name != "_":
            raise RuntimeError(f"the program replaced builtins.{name}")
    write(int(sys.argv[1]), token)
run()
"""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one program: seconds by the clock and of CPU, bytes of memory of each of its
    processes, processes and threads, bytes of its files, files open at once, and the last bytes
    kept of what it prints."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 32 << 20
    open_files: int = 128
    output_bytes: int = 64 << 10


@dataclass(frozen=True)
class Isolation:
    """How programs are confined: the layer, and the user (a number) that they run as."""

    layer: Layer
    user: int


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended; ``message`` is the last line of its error, "" if it passed."""

    status: Literal["passed", "failed", "timed_out", "out_of_memory"]
    message: str
    output: str
    exit_code: int

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __str__(self) -> str:
        words = self.status.replace("_", " ")
        return f"{words}: {self.message}" if words == "failed" else words


@cache
def detect_isolation() -> Isolation:
    """Return the strongest layer that runs a program here, found by trying; warn of what it leaves
    open."""
    own = os.geteuid()
    users = (_NOBODY, own) if own == 0 else (own,)
    candidates = [Isolation(layer, user) for layer in get_args(Layer) for user in users]
    for isolation in candidates:
        try:
            run_python("", SandboxLimits(seconds=60), isolation)
            break
        except (MaxlmError, OSError):
            if isolation == candidates[-1]:
                raise
    if isolation.layer in _NOT_ISOLATED:
        left_open = _NOT_ISOLATED[isolation.layer]
        warnings.warn(f"no namespaces for programs; not isolated: {left_open}", stacklevel=2)
    return isolation


def run_all(
    programs: Sequence[str], limits: SandboxLimits | None = None, workers: int | None = None
) -> list[ExecutionResult]:
    """Run Python programs, `workers` at once (as many as there are cores)."""
    detect_isolation()
    with ThreadPoolExecutor(workers or count_usable_cores()) as pool:
        return list(pool.map(lambda program: run_python(program, limits), programs))


def run_python(
    program: str, limits: SandboxLimits | None = None, isolation: Isolation | None = None
) -> ExecutionResult:
    """Run a Python program in a fresh interpreter, with an empty folder to work in.

    It passes if its last line was reached: the process then writes a token to a pipe. An exit code
    proves nothing (``os._exit(0)``). A program that searches the interpreter's memory for the token
    can lie; nothing within one interpreter prevents that.
    """
    token = secrets.token_hex(16).encode()
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as answer, tempfile.TemporaryFile() as stdin:
        stdin.write(token + b"\n" + program.encode("utf-8", "surrogatepass"))
        stdin.seek(0)
        packages = sysconfig.get_path("purelib")
        command = [sys.executable, "-ISBuc", _HARNESS, str(writer), packages]
        try:
            result = run_command(
                command, limits, isolation=isolation, stdin=stdin.fileno(), inherited=(writer,)
            )
        finally:
            os.close(writer)
        os.set_blocking(answer.fileno(), False)
        if (answer.read(1 + len(token)) or b"") == token and result.status != "timed_out":
            return ExecutionResult("passed", "", result.output, result.exit_code)
    if result.passed:
        message = "it ended before its last line"
        return ExecutionResult("failed", message, result.output, result.exit_code)
    return result


def run_command(
    command: Sequence[str],
    limits: SandboxLimits | None = None,
    *,
    readable: Sequence[Path] = (),
    writable: Sequence[Path] = (),
    folder: Path | None = None,
    isolation: Isolation | None = None,
    stdin: int = subprocess.DEVNULL,
    inherited: Sequence[int] = (),
) -> ExecutionResult:
    """Run a command; it passes if its exit code is 0.

    Args:
        command: an absolute path and its arguments.
        readable: folders that it may read besides the system's and this Python's.
        writable: folders that it may change; their owner becomes the user that it runs as.
        folder: where it works; an empty temporary folder by default.
        isolation: as detected by default. Raises MaxlmError if it is not possible here.
        stdin: a descriptor.
        inherited: further descriptors that it keeps.
    """
    limits, isolation = limits or SandboxLimits(), isolation or detect_isolation()
    own = os.geteuid()
    for top in writable:
        if isolation.user != own and os.stat(top).st_uid != isolation.user:
            for each in (top, *top.rglob("*")):
                os.chown(each, isolation.user, isolation.user, follow_symlinks=False)
    status, alive = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.chown(scratch, isolation.user, -1)
        if isolation.layer == "namespaces":  # They have a /tmp of their own.
            scratch = "/tmp"
        job = {
            "layer": isolation.layer,
            "user": isolation.user,
            "group": isolation.user if isolation.user != own else os.getegid(),
            "limits": asdict(limits),
            "readable": [*_list_system_paths(), *map(os.path.abspath, readable)],
            "writable": [*map(os.path.abspath, writable)],
            "folder": str(folder or scratch),
            "command": [*command],
            "environment": {
                "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
                "HOME": scratch,
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            "status": alive,
        }
        source = Path(isolation_script.__file__).read_text("utf-8")
        process = subprocess.Popen(
            [sys.executable, "-ISBuc", source, repr(job)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            pass_fds=(alive, *inherited),
            start_new_session=True,
        )
        os.close(alive)
        try:
            output, ended = _read_until_end(process, status, limits)
            if ended:  # A zombie until it is waited for: nothing else gets its number.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                if error := os.read(status, 1000):
                    what = f"the command cannot be run in the sandbox: {error.decode()}"
                    raise MaxlmError(what, where=str(command[0]))
        finally:
            os.close(status)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()  # type: ignore
    code, text = process.returncode, output.decode("utf-8", "replace")
    lines = text.strip().splitlines()
    last = lines[-1].strip() if lines else f"exit code {code}"
    if not ended or code == 128 + signal.SIGXCPU:
        return ExecutionResult("timed_out", f"longer than {limits.seconds:g} s", text, code)
    if code == 0:
        return ExecutionResult("passed", "", text, code)
    return ExecutionResult("out_of_memory" if "MemoryError" in last else "failed", last, text, code)


def _list_system_paths() -> list[str]:
    """Return what a program may read: the system's programs and libraries, and this Python's."""
    paths = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/nix/store"]
    paths += [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _read_until_end(
    process: subprocess.Popen[bytes], status: int, limits: SandboxLimits
) -> tuple[bytes, bool]:
    """Return the end of what a process prints, and whether it ended in time."""
    assert process.stdout
    deadline, output, pipe = time.monotonic() + limits.seconds, b"", process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        for descriptor in (pipe, status):
            selector.register(descriptor, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            ready = [key.fd for key, _ in selector.select(left)]
            if pipe in ready:
                chunk = os.read(pipe, 1 << 16)
                output = (output + chunk)[-limits.output_bytes :]
                if not chunk:
                    selector.unregister(pipe)
            elif status in ready:
                return output, True
    return output, False
