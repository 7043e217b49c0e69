"""The processes of a run meet and compare their settings: each connects to process 0,
on the port that JAX uses later, and process 0 answers once all have. The connections
stay open: see ``session.py``."""

import json
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from maxlm.config import MaxlmError
from maxlm.config.errors import ProcessLost
from maxlm.config.show import ABSENT
from maxlm.runtime.cluster import Cluster

NOTICE_SECONDS = 2.0  # in which messages of other processes arrive
_RETRY_SECONDS = 0.2  # between two tries to reach process 0
_MAX_MESSAGE_BYTES = 1 << 24  # a config with many sources is a message


class Connection:
    """Messages over one socket, each a JSON object on a line."""

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._reader = connected.makefile("rb")
        self._lock = threading.Lock()  # Two threads may send at once.

    def send(self, message: Mapping[str, Any]) -> None:
        # Whoever does not get it is gone, which its reader notices.
        with self._lock, suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_seconds: float | None) -> dict[str, Any] | None:
        """Waits for a message; None: closed, silent for so long, or not one of ours."""
        self._socket.settimeout(timeout_seconds)
        try:
            message = json.loads(self._reader.readline(_MAX_MESSAGE_BYTES))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def is_closed(self) -> bool:
        """Whether the other end, which has nothing to send, is closed."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def enable_keepalive(self, timeout_seconds: float) -> None:
        """Lets the kernel probe the other host, and close the connection if it is
        silent for so long, even while Python is busy."""
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # The first probe after half of the time; the other half is for four of them.
        settings = {
            "TCP_KEEPIDLE": max(1, round(timeout_seconds / 2)),
            "TCP_KEEPINTVL": max(1, round(timeout_seconds / 8)),
            "TCP_KEEPCNT": 4,
            "TCP_USER_TIMEOUT": round(timeout_seconds * 1000),
        }
        for name, value in settings.items():
            option = getattr(socket, name, None)
            if option is not None:  # Linux has them all
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def close(self) -> None:
        self._reader.close()
        self._socket.close()


JoinedProcesses = tuple[list[str], dict[int, Connection]]
"""The hosts' names by process, and the connections: process 0 has one to each, the
others one to process 0."""


def join_processes(
    cluster: Cluster, must_match: Mapping[str, Any], *, wait_seconds: float
) -> JoinedProcesses:
    """Meets the other processes, whose ``must_match`` (JSON values by name) must be the
    same; raises ProcessLost if one does not come within ``wait_seconds``.
    """
    if cluster.process_id == 0:
        return _accept_all(cluster, must_match, wait_seconds)
    return _connect(cluster, must_match, wait_seconds)


def check_processes_match(
    hosts: Sequence[str], process_values: Sequence[Mapping[str, Any]]
) -> None:
    """Raises MaxlmError if processes disagree, with each one's value of the first that
    differs."""
    names = dict.fromkeys(name for values in process_values for name in values)
    differing = []
    for name in names:
        first_value = process_values[0].get(name, ABSENT)
        if any(values.get(name, ABSENT) != first_value for values in process_values):
            differing.append(name)
    if not differing:
        return
    first_name, *other_names = differing
    processes_by_value: dict[str, list[int]] = {}
    for process, values in enumerate(process_values):
        value = values.get(first_name, ABSENT)
        text = value if isinstance(value, str) else json.dumps(value)
        processes_by_value.setdefault(text[:200], []).append(process)
    parts = [
        f"{text} on {describe_processes(hosts, processes)}"
        for text, processes in processes_by_value.items()
    ]
    if other_names:
        more = _count_more(other_names, 4)
        parts.append(f"and on {', '.join(other_names[:4])}{more}")
    message = f"hosts disagree on {first_name}: {'; '.join(parts)}"
    fix = "start all hosts with the same software, config and kind of machine"
    raise MaxlmError(message, fix=fix)


def describe_processes(hosts: Sequence[str], processes: Sequence[int]) -> str:
    """``process 0 (node1) and process 1 (node2)``, of many the first four."""
    described = [f"process {process} ({hosts[process]})" for process in processes[:4]]
    return " and ".join(described) + _count_more(processes, 4)


def _count_more(items: Sequence[object], num_shown: int) -> str:
    num_more = len(items) - num_shown
    return f" and {num_more} more" if num_more > 0 else ""


def _accept_all(
    cluster: Cluster, facts: Mapping[str, Any], seconds: float
) -> JoinedProcesses:
    """Process 0: listens until all have connected."""
    deadline = time.monotonic() + seconds
    host_by_process = {0: socket.gethostname()}
    facts_by_process = {0: facts}
    connections: dict[int, Connection] = {}
    # All that called, those too that died since or are not of the run.
    accepted: list[Connection] = []
    try:
        with _listen(cluster, deadline) as server:
            while len(host_by_process) < cluster.num_processes:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                caller = None
                with suppress(TimeoutError):
                    connected, _ = server.accept()
                    caller = Connection(connected)
                # Those that died while they waited are started again.
                for process, connection in list(connections.items()):
                    if connection.is_closed():
                        del host_by_process[process]
                        del connections[process]
                if caller is None:
                    raise _make_missing_error(cluster, host_by_process, seconds)
                accepted.append(caller)
                match caller.receive(NOTICE_SECONDS):
                    case {
                        "process": int(process),
                        "count": int(count),
                        "host": host,
                        "facts": caller_facts,
                    }:
                        _check_greeting(cluster, host_by_process, process, count, host)
                        host_by_process[process] = host
                        connections[process] = caller
                        facts_by_process[process] = caller_facts
                    case _:  # not one of the run's processes
                        caller.close()
        processes = range(cluster.num_processes)
        hosts = [host_by_process[process] for process in processes]
        check_processes_match(
            hosts, [facts_by_process[process] for process in processes]
        )
    except MaxlmError as error:
        refusal = {
            "refused": [error.message, error.where, error.fix],
            "lost": isinstance(error, ProcessLost),
        }
        for connection in accepted:
            connection.send(refusal)
        raise
    for connection in connections.values():
        connection.send({"hosts": hosts})
    return hosts, connections


def _connect(
    cluster: Cluster, facts: Mapping[str, Any], seconds: float
) -> JoinedProcesses:
    """Other processes: connect to process 0 until it answers, which it does once all
    are there."""
    own_host = socket.gethostname()
    greeting = {
        "process": cluster.process_id,
        "count": cluster.num_processes,
        "facts": facts,
        "host": own_host,
    }
    host, _, port = cluster.coordinator.rpartition(":")
    address = (host.strip("[]"), int(port))
    start = time.monotonic()
    while True:
        try:
            seconds_left = start + seconds - time.monotonic()
            timeout = min(max(seconds_left, 1), 10)
            connected = socket.create_connection(address, timeout)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(connected)
            connection.send(greeting)
            # Process 0 may start its own wait only now.
            answer = connection.receive(seconds + 2 * NOTICE_SECONDS) or {}
            if "hosts" in answer:
                return answer["hosts"], {0: connection}
            if "refused" in answer:
                message, where, fix = answer["refused"]
                error_class = ProcessLost if answer["lost"] else MaxlmError
                raise error_class(message, where=where, fix=fix)
            connection.close()
            problem = "something there does not answer as process 0 would"
        except OSError as error:
            problem = str(error.strerror or error)
        seconds_passed = time.monotonic() - start
        if seconds_passed > seconds:
            raise ProcessLost(
                f"process {cluster.process_id} on {own_host} cannot reach process 0 at "
                f"{cluster.coordinator}: {problem} (tried for {seconds_passed:.0f} s)",
                fix="check that process 0 runs there, and that the port is open "
                "between the hosts",
            )
        time.sleep(_RETRY_SECONDS)


def _check_greeting(
    cluster: Cluster, hosts: Mapping[int, str], process: int, count: int, host: str
) -> None:
    if count != cluster.num_processes:
        raise MaxlmError(
            f"processes disagree on how many they are: process {process} on {host} "
            f"says {count}, process 0 on {hosts[0]} says {cluster.num_processes}",
            fix="give all of them the same number",
        )
    if process in hosts:
        message = (
            f"two processes say that they are process {process}: on {hosts[process]} "
            f"and {host}"
        )
        raise MaxlmError(message, fix="give each a process id of its own")


def _make_missing_error(
    cluster: Cluster, hosts: Mapping[int, str], seconds: float
) -> ProcessLost:
    count = cluster.num_processes
    present = sorted(hosts)
    absent = [process for process in range(count) if process not in hosts]
    came = ", ".join(f"{process} ({hosts[process]})" for process in present[:8])
    missing = ", ".join(str(process) for process in absent[:8])
    return ProcessLost(
        f"waited {seconds:g} s at {cluster.coordinator}: {len(hosts)} of {count} "
        f"processes came: {came}; missing: {missing}{_count_more(absent, 8)}",
        fix="see the logs of the missing, and whether they can reach that address",
    )


def _listen(cluster: Cluster, deadline: float) -> socket.socket:
    """Returns a socket on the coordinator's port, once it is free."""
    _, _, port = cluster.coordinator.rpartition(":")
    is_dual_stack = socket.has_dualstack_ipv6()
    while True:
        try:
            return socket.create_server(
                ("", int(port)),
                family=socket.AF_INET6 if is_dual_stack else socket.AF_INET,
                backlog=max(128, cluster.num_processes),
                dualstack_ipv6=is_dual_stack,
            )
        except OSError as error:
            if time.monotonic() > deadline:
                message = (
                    f"process 0 on {socket.gethostname()} cannot listen on port "
                    f"{port}: {error.strerror}"
                )
                fix = "end what uses it there, or choose another port"
                raise MaxlmError(message, fix=fix) from None
        time.sleep(_RETRY_SECONDS)
