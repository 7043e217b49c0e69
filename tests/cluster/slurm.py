"""A SLURM of its own for a test: munged, slurmctld and two slurmd on this machine, in a
folder."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
INSTALL = "apt-get install -y slurm-wlm munge"
# Loopback addresses need no entry in /etc/hosts to be names that resolve.
NODES = ("127.0.0.11", "127.0.0.12")
# Debian puts daemons where a user's PATH has no entry.
PATH = os.pathsep.join(
    (os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin")
)

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job waits for so long before it is started anew (120 s by default).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
NodeName={nodes[0]} NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=1
NodeName={nodes[1]} NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why SLURM cannot be run here, and the command that installs it; None if it
    can."""
    absent = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    return f"{', '.join(absent)} not installed: {INSTALL}" if absent else None


@contextmanager
def slurm(folder: Path) -> Iterator[Mapping[str, str]]:
    """Run it until the block ends; nothing of it, or of its jobs, is left behind.

    Args:
        folder: empty, of a short path (a socket's is at most 107 bytes long).

    Yields:
        The environment in which srun, sbatch and the others find it.
    """
    environ = {
        name: text for name, text in os.environ.items() if not name.startswith("SLURM_")
    }
    environ |= {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    _describe(folder)
    with ExitStack() as stack:
        stack.callback(_kill_all, folder)
        key, socket_path = folder / "munge.key", folder / "munge.socket"
        munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
        munged += [f"--socket={socket_path}", f"--pid-file={folder}/munged.pid"]
        munged += [
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        ]
        stack.enter_context(_daemon(munged, folder, environ, socket_path.exists))
        stack.enter_context(
            _daemon(["slurmctld", "-D"], folder, environ, lambda: _answers(environ))
        )
        for node in NODES:
            stack.enter_context(_daemon(["slurmd", "-D", "-N", node], folder, environ))
        _wait_until(
            lambda: _states(environ) == ["idle"] * len(NODES), folder, "idle nodes"
        )
        stack.callback(_cancel, environ)
        yield environ


def _describe(folder: Path) -> None:
    """The files it needs before it starts."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    (folder / "state").mkdir()
    # Others may not write to what lies above a socket; all may pass.
    folder.chmod(0o755)
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=socket.gethostname(),
            user=getpass.getuser(),
            folder=folder,
            nodes=NODES,
            ports=[free_port() for _ in range(1 + len(NODES))],
        )
    )
    # Its control groups are not asked for, but it reads how it would use them.
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


@contextmanager
def _daemon(
    command: list[str],
    folder: Path,
    environ: Mapping[str, str],
    ready: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    with (folder / "daemons.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        _wait_until(ready, folder, command[0], process)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(environ: Mapping[str, str]) -> bool:
    command = ["scontrol", "ping"]
    result = subprocess.run(
        command, env=environ, capture_output=True, text=True, check=False
    )
    return " is UP" in result.stdout


def _states(environ: Mapping[str, str]) -> list[str]:
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    result = subprocess.run(
        command, env=environ, capture_output=True, text=True, check=False
    )
    return result.stdout.split()


def _wait_until(
    happened: Callable[[], bool],
    folder: Path,
    missing: str,
    process: subprocess.Popen | None = None,
) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        if time.monotonic() > deadline or (process and process.poll() is not None):
            ends_of_logs = []
            for log in sorted(folder.glob("*.log")):
                end = log.read_text(errors="replace")[-2000:]
                ends_of_logs.append(f"--- {log.name}\n{end}")
            raise RuntimeError("\n".join([f"no {missing}", *ends_of_logs]))
        time.sleep(0.1)


def _cancel(environ: Mapping[str, str]) -> None:
    subprocess.run(["scancel", "--user", getpass.getuser()], env=environ, check=False)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        command = ["squeue", "--noheader"]
        result = subprocess.run(command, env=environ, capture_output=True, check=False)
        if not result.stdout:
            return
        time.sleep(0.2)


def _kill_all(folder: Path) -> None:
    """Steps outlive their slurmd: all processes that were told of this folder."""
    mark = f"SLURM_CONF={folder}/".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in environ.read_bytes() and int(environ.parent.name) != os.getpid():
                os.kill(int(environ.parent.name), signal.SIGKILL)
