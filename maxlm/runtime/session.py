"""The processes of a run meet, compare their settings, notice when one of them is lost,
and tell each other how they end.

JAX's own service meets and notices too, but ends the process from C++, without saying
who was missing, and accepts processes that disagree on their number. So each process
first connects to process 0 (``rendezvous.py``) and keeps the connection for as long as
it runs: the operating system closes it when a process dies, and TCP's keepalive probes
detect a host that is silent.
"""

import os
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any, NoReturn

import jax

from maxlm.config import MaxlmError
from maxlm.config.errors import LOST, ProcessLost, find_user_error
from maxlm.config.keys import flatten, join_key
from maxlm.runtime.cluster import Cluster, find_cluster
from maxlm.runtime.rendezvous import (
    NOTICE_SECONDS,
    Connection,
    check_processes_match,
    describe_processes,
    join_processes,
)

FAILED, _INTERRUPTED = 1, 130


@contextmanager
def distributed_session(
    settings: Mapping[str, Any],
    *,
    join_timeout_seconds: float,
    peer_timeout_seconds: float,
    cluster_variables: Mapping[str, str] = {},
) -> Iterator[None]:
    """Joins the cluster that this process was started in, if it is one of several, for
    the block.

    Enter it before any other use of JAX. A process whose block fails ends at once and
    ends all others, which would wait for it forever. An error raised by all processes
    together leaves the block as usual.

    Args:
        settings: the run's settings as nested JSON values; all processes must have the
            same.
        join_timeout_seconds: how long to wait for the other processes to start.
        peer_timeout_seconds: how long a process may stay silent before it counts as
            lost.
        cluster_variables: values in place of the environment's, for ``find_cluster``.
    """
    cluster = find_cluster({**os.environ, **cluster_variables})
    if cluster is None:
        yield
        return
    facts = {join_key(key): value for key, value in flatten(settings)}
    peers = join_cluster(
        cluster,
        facts,
        wait_seconds=join_timeout_seconds,
        peer_timeout_seconds=peer_timeout_seconds,
    )
    try:
        _check_same_devices(peers)
        yield
    except KeyboardInterrupt:
        peers.abort_all_processes(_INTERRUPTED, "interrupted")
    except BaseException as error:
        known = find_user_error(error)
        if known and known.on_all_processes:
            peers.leave()
            raise
        # A file that needs all processes was not written because one is gone: no
        # mistake.
        if lost := describe_lost_peer(error.__cause__ if known else error):
            peers.abort_all_processes(LOST, lost)
        if known:
            print(f"error: {known}", file=sys.stderr, flush=True)
            peers.abort_all_processes(known.exit_code, str(known))
        traceback.print_exc()
        peers.abort_all_processes(FAILED, repr(error))
    peers.leave()


def _check_same_devices(peers: "Peers") -> None:
    devices = [jax.local_devices(process) for process in range(jax.process_count())]
    try:
        facts = [{"devices": f"{len(own)} {own[0].device_kind}"} for own in devices]
        check_processes_match(peers.hosts, facts)
    except MaxlmError as error:
        error.on_all_processes = True  # each sees all devices
        raise


class Peers:
    """The other processes of a run; made by ``join_cluster``."""

    def __init__(
        self, cluster: Cluster, hosts: list[str], connections: Mapping[int, Connection]
    ):
        self.cluster, self.hosts = cluster, hosts
        self._connections = (
            connections  # process 0 has one to each, the others one to it
        )
        self._ending, self._lead_left = threading.Lock(), threading.Event()
        self._exit_code: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._enforce_exit, daemon=True).start()
        for process, connection in connections.items():
            threading.Thread(
                target=self._listen, args=(process, connection), daemon=True
            ).start()

    def leave(self) -> None:
        """Says that this process is done, as all processes are; it may then exit with
        any code, for which JAX waits until the others have left too. Process 0, which
        may have files to copy, is the first: JAX would abort it if one that has left
        were killed."""
        if self.cluster.process_id:
            self._lead_left.wait()
        self._send({"left": True})

    def abort_all_processes(self, code: int, text: str) -> NoReturn:
        """Ends this process at once, and the others, which print ``text``, with the
        same code.

        After FAILED and LOST it waits a moment: if the cause is that a peer is lost,
        the process ends in the meantime as ``join_cluster`` says.
        """
        if code in (FAILED, LOST):
            time.sleep(NOTICE_SECONDS)
        own = describe_processes(self.hosts, [self.cluster.process_id])
        self._end(code, f"{own}: {text}", None)

    def _listen(self, process: int, connection: Connection) -> None:
        has_left = False
        while message := connection.receive(None):
            if "left" in message:
                has_left = True
                self._lead_left.set()  # of no use on process 0
            elif "ended" in message:
                self._end(int(message["ended"]), str(message.get("text")), process)
        if not has_left:
            gone = f"{describe_processes(self.hosts, [process])} is gone"
            self._end(
                LOST, f"{gone}; the state is that of the last checkpoint", process
            )

    def _end(self, code: int, text: str, told_by: int | None) -> NoReturn:
        """Ends this process and, by a message, the others."""
        self._ending.acquire()  # once: the first reason is the cause of the others
        self._send({"ended": code, "text": text}, except_for=told_by)
        if self.cluster.process_id == 0:
            time.sleep(
                NOTICE_SECONDS / 2
            )  # JAX aborts processes when its service is gone
        self._exit_code.put(code)
        if told_by is not None:
            with suppress(OSError):
                os.write(2, f"error: {text}\n".encode())
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # the normal way out would wait for the peers

    def _enforce_exit(self) -> NoReturn:
        """Exits also where nobody reads what `_end` writes, or another thread holds its
        lock. It waits from the beginning: to start a thread then would let JAX abort
        the process first."""
        code = self._exit_code.get()
        time.sleep(NOTICE_SECONDS)
        os._exit(code)

    def _send(self, message: Mapping[str, Any], except_for: int | None = None) -> None:
        for process, connection in self._connections.items():
            if process != except_for:
                connection.send(message)


def join_cluster(
    cluster: Cluster,
    must_match: dict[str, Any],
    *,
    wait_seconds: float,
    peer_timeout_seconds: float,
) -> Peers:
    """Meets the other processes and starts JAX's distributed runtime, before any other
    use of JAX.

    From here on this process ends, with a line on stderr and code LOST, when a peer
    dies before it has left, or its host is silent for ``peer_timeout_seconds``; or as a
    peer says (``abort_all_processes``). When a peer is alive but stopped, JAX's own
    service aborts the others (SIGABRT, with a report).

    ``must_match``, JSON values by name, and versions of software must be the same on
    all. Raises ProcessLost if processes did not come, or JAX's runtime did not start.
    """
    versions = {name: version(name) for name in ("maxlm", "jax", "jaxlib")}
    hosts, connections = join_processes(
        cluster, versions | must_match, wait_seconds=wait_seconds
    )
    for connection in connections.values():
        connection.enable_keepalive(0.8 * peer_timeout_seconds)
    peers = Peers(cluster, hosts, connections)
    try:
        _start_jax(cluster, wait_seconds, peer_timeout_seconds)
    except RuntimeError as error:
        what = f"JAX's distributed runtime did not start ({' '.join(str(error).split())[:200]})"
        raise ProcessLost(what, fix="start the processes again") from error
    return peers


def describe_lost_peer(error: BaseException | None) -> str | None:
    """Returns one line for an error of a collective whose peer, or the network to it,
    is gone; None for any other. ``Peers`` mostly knows which peer it is: see
    ``Peers.abort_all_processes``."""
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError", "ValueError"):
        return None
    text = " ".join(str(error).split())
    signs = r"gloo|nccl|socket closed|connection (reset|closed|refused)|coordination ?service"
    if not re.search(signs, text, re.IGNORECASE):
        return None
    return f"a peer cannot be reached; the state is that of the last checkpoint ({text[:200]})"


def _start_jax(cluster: Cluster, wait_seconds: float, peer_seconds: float) -> None:
    # A proxy set for the web is no way to a host beside this one; gRPC would take it,
    # and hang.
    host = cluster.coordinator.rpartition(":")[0].strip("[]")
    exempt = filter(None, (os.environ.get("no_grpc_proxy"), host))  # noqa: SIM112
    os.environ["no_grpc_proxy"] = ",".join(exempt)  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's client aborts the process when process 0 is gone. It first writes a
    # symbolized stack trace, which takes some hundred milliseconds; our own thread,
    # whose connection closes at the same time, needs a few and ends the process before.
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        cluster.local_device_ids,
        cluster_detection_method="deactivate",  # or SLURM would mean one GPU a process
        initialization_timeout=max(1, round(wait_seconds)),
        heartbeat_timeout_seconds=max(1, round(peer_seconds)),
        # process 0 may have files to copy when all is done
        shutdown_timeout_seconds=86400,
    )
