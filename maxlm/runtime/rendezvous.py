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

from maxlm.config import ABSENT, MaxlmError
from maxlm.config.errors import ProcessLost
from maxlm.runtime.cluster import Cluster

NOTICE_SECONDS = 2.0  # in which messages of other processes arrive
_RETRY_SECONDS = 0.2  # between two tries to reach process 0
_MAX_MESSAGE_BYTES = 1 << 24  # a config with many sources is a message


class Connection:
    """Messages over one socket, each a JSON object on a line."""

    def __init__(self, connected: socket.socket):
        self._socket, self._reader = connected, connected.makefile("rb")
        self._lock = threading.Lock()

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
        idle, interval = (max(1, round(timeout_seconds / part)) for part in (2, 8))
        settings = {"TCP_KEEPIDLE": idle, "TCP_KEEPINTVL": interval, "TCP_KEEPCNT": 4}
        settings["TCP_USER_TIMEOUT"] = round(timeout_seconds * 1000)
        for name, value in settings.items():
            if option := getattr(socket, name, None):  # Linux has them all
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
    return (_connect if cluster.process_id else _accept_all)(
        cluster, must_match, wait_seconds
    )


def check_processes_match(
    hosts: Sequence[str], process_values: Sequence[Mapping[str, Any]]
) -> None:
    """Raises MaxlmError if processes disagree, with each one's value of the first that
    differs."""
    names = dict.fromkeys(name for each in process_values for name in each)
    values = {
        name: [each.get(name, ABSENT) for each in process_values] for name in names
    }
    differing = [
        name for name, each in values.items() if any(value != each[0] for value in each)
    ]
    if not differing:
        return
    name, *others = differing
    groups: dict[str, list[int]] = {}
    for process, value in enumerate(values[name]):
        text = value if isinstance(value, str) else json.dumps(value)
        groups.setdefault(text[:200], []).append(process)
    words = [
        f"{text} on {describe_processes(hosts, who)}" for text, who in groups.items()
    ]
    if others:
        words.append(f"and on {', '.join(others[:4])}{_more(others, 4)}")
    what = f"hosts disagree on {name}: {'; '.join(words)}"
    raise MaxlmError(
        what, fix="start all hosts with the same software, config and kind of machine"
    )


def describe_processes(hosts: Sequence[str], processes: Sequence[int]) -> str:
    """``process 0 (node1) and process 1 (node2)``, of many the first four."""
    words = [f"process {process} ({hosts[process]})" for process in processes[:4]]
    return " and ".join(words) + _more(processes, 4)


def _more(items: Sequence[Any], shown: int) -> str:
    return f" and {len(items) - shown} more" if len(items) > shown else ""


def _accept_all(
    cluster: Cluster, facts: Mapping[str, Any], seconds: float
) -> JoinedProcesses:
    """Process 0: listens until all have connected."""
    deadline = time.monotonic() + seconds
    hosts = {0: socket.gethostname()}
    connections = dict[int, Connection]()
    all_facts = {0: facts}
    accepted = list[Connection]()
    try:
        with _listen(cluster, deadline) as server:
            while len(hosts) < cluster.num_processes:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                caller = None
                with suppress(TimeoutError):
                    caller = Connection(server.accept()[0])
                # Those that died while they waited are started again.
                for process in [
                    p for p, each in connections.items() if each.is_closed()
                ]:
                    del hosts[process], connections[process]
                if caller is None:
                    raise _missing_error(cluster, hosts, seconds)
                accepted.append(caller)
                match caller.receive(NOTICE_SECONDS):
                    case {
                        "process": int(process),
                        "count": int(count),
                        "host": host,
                        "facts": own,
                    }:
                        _check_greeting(cluster, hosts, process, count, host)
                        hosts[process], connections[process] = host, caller
                        all_facts[process] = own
                    case _:  # not one of the run's processes
                        caller.close()
        names = [hosts[process] for process in range(cluster.num_processes)]
        check_processes_match(
            names, [all_facts[process] for process in range(len(names))]
        )
    except MaxlmError as error:
        for connection in accepted:
            refused = [error.what, error.where, error.fix]
            connection.send(
                {"refused": refused, "lost": isinstance(error, ProcessLost)}
            )
        raise
    for connection in connections.values():
        connection.send({"hosts": names})
    return names, connections


def _connect(
    cluster: Cluster, facts: Mapping[str, Any], seconds: float
) -> JoinedProcesses:
    """Other processes: connect to process 0 until it answers, which it does once all
    are there."""
    greeting = {
        "process": cluster.process_id,
        "count": cluster.num_processes,
        "facts": facts,
    }
    greeting["host"] = socket.gethostname()
    host, _, port = cluster.coordinator.rpartition(":")
    address = (host.strip("[]"), int(port))
    began = time.monotonic()
    while True:
        try:
            left = began + seconds - time.monotonic()
            connected = socket.create_connection(address, min(max(left, 1), 10))
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(connected)
            connection.send(greeting)
            # Process 0 may start its own wait only now.
            answer = connection.receive(seconds + 2 * NOTICE_SECONDS) or {}
            if "hosts" in answer:
                return answer["hosts"], {0: connection}
            if "refused" in answer:
                what, where, fix = answer["refused"]
                raise (ProcessLost if answer["lost"] else MaxlmError)(
                    what, where=where, fix=fix
                )
            connection.close()
            problem = "something there does not answer as process 0 would"
        except OSError as error:
            problem = str(error.strerror or error)
        passed = time.monotonic() - began
        if passed > seconds:
            raise ProcessLost(
                f"process {cluster.process_id} on {greeting['host']} cannot reach "
                f"process 0 at "
                f"{cluster.coordinator}: {problem} (tried for {passed:.0f} s)",
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
            f"says {count}, "
            f"process 0 on {hosts[0]} says {cluster.num_processes}",
            fix="give all of them the same number",
        )
    if process in hosts:
        what = f"two processes say that they are process {process}: on {hosts[process]} and {host}"
        raise MaxlmError(what, fix="give each a process id of its own")


def _missing_error(
    cluster: Cluster, hosts: Mapping[int, str], seconds: float
) -> ProcessLost:
    count = cluster.num_processes
    came = ", ".join(f"{process} ({hosts[process]})" for process in sorted(hosts)[:8])
    absent = [str(process) for process in range(count) if process not in hosts]
    missing = ", ".join(absent[:8]) + _more(absent, 8)
    return ProcessLost(
        f"waited {seconds:g} s at {cluster.coordinator}: {len(hosts)} of {count} "
        f"processes came: "
        f"{came}; missing: {missing}",
        fix="see the logs of the missing, and whether they can reach that address",
    )


def _listen(cluster: Cluster, deadline: float) -> socket.socket:
    """Returns a socket on the coordinator's port, once it is free."""
    port = int(cluster.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    how: dict[str, Any] = {
        "backlog": max(128, cluster.num_processes),
        "dualstack_ipv6": dual,
    }
    how["family"] = socket.AF_INET6 if dual else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), **how)
        except OSError as error:
            if time.monotonic() > deadline:
                what = (
                    f"process 0 on {socket.gethostname()} cannot listen on port {port}"
                )
                fix = "end what uses it there, or choose another port"
                raise MaxlmError(f"{what}: {error.strerror}", fix=fix) from None
        time.sleep(_RETRY_SECONDS)
