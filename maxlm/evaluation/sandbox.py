"""Runs untrusted programs: a fresh process each, confined by bubblewrap or util-linux,
with limits.

`detect_isolation` finds the strongest layer that works. Root's programs run as another
user.
"""

import os
import random
import secrets
import select
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from maxlm.config import MaxlmError
from maxlm.runtime.pool import count_usable_cores

Layer = Literal["bwrap", "unshare", "limits"]
_EMPTY = "/tmp/empty"  # A folder of its own: this Python may lie beneath /tmp.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/nix/store")
# A new root, built over /proc: nothing that a program may read lies beneath. A
# container that hides a part of its own /proc allows no other. The shell stays, to
# collect orphans.
_BUILD_ROOT = """set -e
mount -t tmpfs -o mode=755,size=16m tmpfs /proc
cd /proc; mkdir proc dev tmp old
mount -t tmpfs -o mode=1777,nr_inodes=10000,size={size} tmpfs tmp
mkdir -p {made} && mkdir -m 1777 .{empty}
for path in {readable}; do mount --bind -o ro "$path" ".$path"; done
for path in {writable}; do mkdir -p ".$path"; mount --bind "$path" ".$path"; done
for name in null zero random urandom; do : > dev/$name; mount --bind /dev/$name dev/$name; done
ln -s /tmp dev/shm
mount -t proc proc proc 2> /dev/null || :
ip link set lo up 2> /dev/null || :
mount -o remount,bind,ro .
pivot_root . old; umount -l /old
cd {folder}
"$@"; exit $?
"""
# The program runs in a module of its own, after which builtins must be as they were: a
# program that replaces `abs` passes the tests that call it. The token proves that its
# last line was reached.
_HARNESS = """
import builtins, os, sys
def run(write=os.write, table=vars(builtins)):
    token, _, program = sys.stdin.buffer.read().partition(b"\\n")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path.append(sys.argv[2])
    module = sys.modules["program"] = type(sys)("program")
    known = list(table.items())
    write(int(sys.argv[1]), b"+")
    exec(compile(program, "program.py", "exec"), vars(module))
    if replaced := [name for name, value in known if table.get(name) is not value and name != "_"]:
        raise RuntimeError(f"the program replaced builtins: {replaced}")
    write(int(sys.argv[1]), token)
run()
"""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one program: seconds by the clock, bytes of memory of each process,
    processes and threads, bytes of files and of output, files open at once, and the
    last bytes kept of output."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 32 << 20
    open_files: int = 128
    output_bytes: int = 64 << 10


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended; ``message`` is the last line of its error, "" if it
    passed."""

    status: Literal["passed", "failed", "timed_out", "out_of_memory"]
    message: str
    output: str
    exit_code: int

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@cache
def detect_isolation() -> Layer:
    """Return the strongest layer that runs a program here, found by trying; warn if it
    is limits alone. Raises MaxlmError if none does."""
    # Within bwrap root remains root, whose processes have no limit.
    for layer in get_args(Layer)[os.geteuid() == 0 :]:
        with suppress(MaxlmError, OSError):
            run_python("", SandboxLimits(seconds=60), layer)
            if layer == "limits":
                warnings.warn(
                    "not isolated: the network, files, other processes", stacklevel=2
                )
            return layer
    raise MaxlmError(
        "no sandbox works here", fix="install util-linux; do not run this as root"
    )


def run_all(
    programs: Sequence[str],
    limits: SandboxLimits | None = None,
    workers: int | None = None,
) -> list[ExecutionResult]:
    """Run Python programs, `workers` at once (as many as there are cores)."""
    detect_isolation()
    with ThreadPoolExecutor(workers or count_usable_cores()) as pool:
        return list(pool.map(lambda program: run_python(program, limits), programs))


def run_python(
    program: str, limits: SandboxLimits | None = None, layer: Layer | None = None
) -> ExecutionResult:
    """Run a Python program in a fresh interpreter, with an empty folder to work in.

    It passes if its last line was reached, after which a token is written: an exit code
    proves nothing (``os._exit(0)``). A program can still lie that searches the
    interpreter's memory. Raises MaxlmError if it cannot be started.
    """
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as answer:
        stdin.write(token + b"\n" + program.encode("utf-8", "surrogatepass"))
        stdin.seek(0)
        files = (stdin.fileno(), answer.fileno())
        packages = sysconfig.get_path("purelib")
        command = [sys.executable, "-ISBuc", _HARNESS, str(files[1]), packages]
        result = run_command(command, limits, layer=layer, files=files)
        answer.seek(0)
        answered = answer.read()
    if result.status == "timed_out":
        return result
    if not answered:
        raise MaxlmError(f"a program cannot be run in the sandbox: {result.message}")
    if answered == b"+" + token:
        return replace(result, status="passed", message="")
    early = "it ended before its last line"
    return replace(result, status="failed", message=early) if result.passed else result


def run_command(
    command: Sequence[str],
    limits: SandboxLimits | None = None,
    *,
    folder: Path | None = None,
    readable: Sequence[Path] = (),
    layer: Layer | None = None,
    files: Sequence[int] = (subprocess.DEVNULL,),
) -> ExecutionResult:
    """Run a command; it passes if its exit code is 0. It works in, and may change,
    `folder` (root changes its owner; by default an empty one), and may read `readable`
    besides the system's folders and this Python's. `files` are descriptors: its
    standard input, and others it keeps."""
    limits, layer = limits or SandboxLimits(), layer or detect_isolation()
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as scratch, tempfile.TemporaryFile() as printed:
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        folder = (
            folder.absolute()
            if folder
            else Path(scratch if layer == "limits" else _EMPTY)
        )
        process = subprocess.Popen(
            [*_list_prefix(layer, limits, folder, readable), *command],
            stdin=files[0],
            stdout=printed,
            stderr=subprocess.STDOUT,
            cwd=scratch if str(folder) == _EMPTY else folder,
            env={
                "PATH": path,
                "HOME": str(folder),
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "1",
            },
            pass_fds=files[1:],
            start_new_session=True,
        )
        ended = select.poll()
        descriptor = os.pidfd_open(process.pid)
        try:
            ended.register(descriptor, select.POLLIN)
            in_time = bool(ended.poll(limits.seconds * 1000))
        finally:
            os.close(descriptor)
            os.killpg(
                process.pid, signal.SIGKILL
            )  # Not waited for yet: its number is its own.
            code = process.wait()
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - limits.output_bytes))
        text = printed.read().decode("utf-8", "replace")
    last = (text.strip().splitlines() or [f"exit code {code}"])[-1].strip()[:500]
    if not in_time:
        return ExecutionResult(
            "timed_out", f"longer than {limits.seconds:g} s", text, code
        )
    status = (
        "passed"
        if code == 0
        else "out_of_memory"
        if "MemoryError" in text[-99:]
        else "failed"
    )
    return ExecutionResult(status, last if code else "", text, code)


def _list_prefix(
    layer: Layer, limits: SandboxLimits, folder: Path, readable: Sequence[Path]
) -> list[str]:
    """Return the command that runs, confined, the one that is put behind it."""
    size = limits.file_bytes
    processes = limits.processes
    is_root = os.geteuid() == 0
    at = shlex.quote(str(folder))
    rights = "setpriv --no-new-privs"
    own = "" if at == _EMPTY else at
    if (
        is_root
    ):  # A user each, of systemd's for services: processes are limited by user.
        user = random.randrange(61184, 65520)
        rights += f" --reuid={user} --regid={user} --clear-groups"
        if own:
            subprocess.run(["chown", "-hR", f"{user}:{user}", folder], check=True)
    elif layer == "limits":  # It counts all of the user's: allow for those there.
        processes += int(
            Path("/proc/loadavg").read_text("utf-8").split()[3].partition("/")[2]
        )
    # If the machine runs out of memory, this one ends first.
    prefix = "choom -n 1000 -- setpriv --pdeathsig KILL "
    python = (sys.prefix, sys.base_prefix, Path(sys.executable).resolve().parents[1])
    paths = dict.fromkeys(
        os.path.abspath(each) for each in (*_SYSTEM, *python, *readable)
    )
    found = [shlex.quote(path) for path in paths if os.path.exists(path)]
    if layer == "bwrap":
        prefix += "bwrap --unshare-all --die-with-parent --proc /proc --dev /dev "
        prefix += f"--size {size} --tmpfs /tmp --perms 1777 --dir {_EMPTY} "
        prefix += "".join(f"--ro-bind {path} {path} " for path in found)
        prefix += f"{own and f'--bind {at} {at}'} --remount-ro / --chdir {at} "
    elif layer == "unshare":
        rights += " --bounding-set=-all --inh-caps=-all"
        read = " ".join(found)
        made = " .".join(["", *found])
        folders = {
            "readable": read,
            "made": made,
            "writable": own,
            "folder": at,
            "empty": _EMPTY,
        }
        script = _BUILD_ROOT.format(**folders, size=size)
        prefix += "unshare --mount --net --pid --ipc --uts --kill-child "
        prefix += (
            f"{'' if is_root else '--map-root-user'} sh -c {shlex.quote(script)} sh "
        )
    limit = f" prlimit --as={limits.memory_bytes} --fsize={size} --core=0 --nproc={processes}"
    limit += f" --nofile={limits.open_files} --cpu={int(limits.seconds) + 1}"
    return shlex.split(prefix + rights + limit)
