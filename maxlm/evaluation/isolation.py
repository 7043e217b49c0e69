"""Confines one command and runs it: the script that `maxlm.evaluation.sandbox` starts.

It runs as ``python -I -S -c SOURCE JOB``, once a program, so it imports little (``json`` would take
as long as all else). JOB is a dict as `repr` writes it:
``layer`` ("namespaces", "seccomp" or "limits"), ``user`` and ``group`` (numbers that the command
runs as), ``limits`` (`SandboxLimits`), ``readable`` and ``writable`` (paths), ``folder`` (where it
works), ``command``, ``environment``, ``status`` (a descriptor that closes when all has ended; an
error before the command starts is written to it).
"""

import ctypes
import fcntl
import os
import resource
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# socket, kill, tkill, tgkill, both sigqueueinfo, pidfd_send_signal, setsid, setpgid, ptrace,
# process_vm_writev, io_uring_setup (which opens sockets), by machine, after its audit number.
_BLOCKED = {
    "x86_64": (0xC000003E, 41, 62, 200, 234, 129, 297, 424, 112, 109, 101, 311, 425),
    "aarch64": (0xC00000B7, 198, 129, 130, 131, 138, 240, 424, 157, 154, 117, 271, 425),
}


def main(job: dict) -> None:
    """Run a job; the exit code is its command's, or 128 and the signal's number."""
    try:
        _die_with_parent()
        if job["layer"] == "namespaces":
            enter_namespaces(job)
            build_root(job)
        if (child := os.fork()) == 0:
            set_limits(job)
            os.execve(job["command"][0], job["command"], job["environment"])
    except BaseException as error:
        os.write(job["status"], str(error).encode())
        os._exit(125)
    while True:  # The first process of a namespace also reaps what the command leaves behind.
        pid, status = os.wait()
        if pid == child:
            os._exit(_shell_exit_code(status))


def enter_namespaces(job: dict) -> None:
    """Go on as the first process of new user, network, process, mount, IPC and host name
    namespaces, all of whose processes end with it; the one that called waits for it."""
    owner, (reader, writer) = os.getpid(), os.pipe()
    if job["user"] != os.geteuid():
        os.setgroups([])
    if (mapper := os.fork()) == 0:  # A namespace's users are mapped from outside.
        os.close(writer)
        started = os.read(reader, 1)
        users, groups = {os.geteuid(), job["user"]}, {os.getegid(), job["group"]}
        wrote = started and all(
            _write(f"/proc/{owner}/{name}", "\n".join(f"{each} {each} 1" for each in ids) or "deny")
            for name, ids in {"setgroups": (), "uid_map": users, "gid_map": groups}.items()
        )
        os._exit(0 if wrote else 1)
    _call("unshare", 0x7C020000)  # CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
    os.write(writer, b"1")
    if os.waitpid(mapper, 0)[1]:
        raise OSError("the users of a namespace cannot be mapped")
    if first := os.fork():
        os._exit(_shell_exit_code(os.waitpid(first, 0)[1]))
    _die_with_parent()


def build_root(job: dict) -> None:
    """Replace the root by one of the readable paths, read-only, the writable ones, a few devices
    and an empty /tmp of ``limits.file_bytes``. Bring the loopback device up."""
    import _socket

    base = "/proc"  # Nothing that is readable lies beneath it.
    _mount(None, "/", None, 0x44000)  # MS_REC, MS_PRIVATE
    _mount("tmpfs", base, "tmpfs", 6, "mode=755,size=1m")  # MS_NOSUID, MS_NODEV
    for name in ("proc", "dev", "tmp"):
        os.mkdir(f"{base}/{name}")
    size = f"mode=1777,nr_inodes=10000,size={job['limits']['file_bytes']}"
    _mount("tmpfs", f"{base}/tmp", "tmpfs", 6, size)
    for path in job["readable"] + job["writable"]:
        target = base + path
        if os.path.lexists(target) and os.path.islink(path):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(target, exist_ok=True)
        _mount(path, target, None, 0x5000)  # MS_BIND, MS_REC
        _set_mount_flags(target, 6 if path in job["writable"] else 7, recursive=True)
    for device in DEVICES:
        _write(base + device, "")
        _mount(device, base + device, None, 0x1000)
    os.symlink("/tmp", f"{base}/dev/shm")
    proc = f"{base}/proc".encode()  # A container that hides a part of its own allows none.
    libc.mount(b"proc", proc, b"proc", 14, None)  # MS_NOSUID, MS_NODEV, MS_NOEXEC
    os.chdir(base)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", 2)  # MNT_DETACH
    _set_mount_flags("/", 7, recursive=False)
    request = struct.pack("16sh14x", b"lo", 1)  # IFF_UP
    fcntl.ioctl(_socket.socket(), 0x8914, request)  # SIOCSIFFLAGS


def set_limits(job: dict) -> None:
    """Set limits, give up privileges and, without namespaces, deny files, sockets and signals."""
    limits = job["limits"]
    _write("/proc/self/oom_score_adj", "1000")  # If memory runs out, this one ends first.
    os.chdir(job["folder"])
    os.set_inheritable(job["status"], False)
    for capability in range(64):  # Root keeps none, either.
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    if job["user"] != os.geteuid():
        if job["layer"] != "namespaces":
            os.setgroups([])
        os.setresgid(*[job["group"]] * 3)
        os.setresuid(*[job["user"]] * 3)
    amounts = {"AS": limits["memory_bytes"], "NPROC": limits["processes"], "CORE": 0}
    if job["layer"] != "namespaces":  # There it counts all of the user's: allow for those there.
        with open("/proc/loadavg") as file:
            amounts["NPROC"] += int(file.read().split()[3].partition("/")[2])
    amounts |= {"FSIZE": limits["file_bytes"], "NOFILE": limits["open_files"]}
    for name, amount in amounts.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (amount, amount))
    cpu = int(limits["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    _die_with_parent()
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if job["layer"] == "seccomp":
        limit_files(job)
        block_system_calls()


def limit_files(job: dict) -> None:
    """Allow reading of the readable paths and writing of the writable ones, by Landlock."""
    version = _call("syscall", 444, None, 0, 1)
    every = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    ruleset = _call("syscall", 444, ctypes.byref(ctypes.c_uint64(every)), 8, 0)
    rules = dict.fromkeys(job["readable"], 13) | dict.fromkeys(DEVICES, 6)  # execute, read; r, w
    for path, rights in (rules | dict.fromkeys([*job["writable"], job["folder"]], every)).items():
        rule = struct.pack("=Qi", rights, os.open(path, os.O_PATH | os.O_CLOEXEC))
        _call("syscall", 445, ruleset, 1, rule, 0)
    _call("syscall", 446, ruleset, 0)


def block_system_calls() -> None:
    """Make sockets, signals and new process groups fail, by a seccomp filter (EPERM)."""
    audit, *blocked = _BLOCKED[os.uname().machine]
    last = len(blocked) + 1
    rows = [(0x20, 0, 0, 4), (0x15, 0, last + 2, audit), (0x20, 0, 0, 0), (0x35, last, 0, 1 << 30)]
    rows += [(0x15, last - 1 - index, 0, number) for index, number in enumerate(blocked)]
    rows += [(6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x00050001)]  # allow; EPERM
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    filters = struct.pack("HxxxxxxP", len(rows), ctypes.addressof(program))
    _call("prctl", 22, 2, filters, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _die_with_parent() -> None:
    _call("prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL


def _write(path: str, text: str) -> bool:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        return False
    return True


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [text and text.encode() for text in (source, target, kind)]
    _call("mount", *texts, flags, data.encode())


def _set_mount_flags(path: str, flags: int, *, recursive: bool) -> None:
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)  # 1 read-only, 2 no set-uid, 4 no devices
    _call("syscall", 442, -100, path.encode(), 0x8000 if recursive else 0, attributes, 32)


def _call(name: str, *arguments) -> int:
    words = (ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)
    result = getattr(libc, name)(*words)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _shell_exit_code(status: int) -> int:
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


if __name__ == "__main__":
    main(eval(sys.argv[1]))
