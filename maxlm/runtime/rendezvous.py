"""How the processes of a run meet: each connects to process 0, on the port that JAX uses later;
process 0 answers once all have connected.

The connections stay open: see ``peers.py``.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from maxlm.config import MaxlmError
from maxlm.config.errors import Lost
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

    def receive(self, seconds: float | None) -> dict[str, Any] | None:
        """Waits for a message; None: closed, silent for so long, or not one of ours."""
        self._socket.settimeout(seconds)
        try:
            message = json.loads(self._reader.readline(_MAX_MESSAGE_BYTES))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def is_closed(self) -> bool:
        """Whether the other end is closed."""
        self._socket.settimeout(0)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self._socket.settimeout(NOTICE_SECONDS)  # for what is sent

    def keep_alive(self, seconds: float) -> None:
        """Lets the kernel probe the other host, and close the connection if it is silent for so
        long, even while Python is busy."""
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        settings = {
            "TCP_KEEPIDLE": max(1, round(seconds / 2)),
            "TCP_KEEPINTVL": max(1, round(seconds / 8)),
            "TCP_KEEPCNT": 4,
            "TCP_USER_TIMEOUT": round(seconds * 1000),
        }
        for name, value in settings.items():
            if option := getattr(socket, name, None):  # Linux has them all
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def close(self) -> None:
        self._reader.close()
        self._socket.close()


@dataclass(frozen=True)
class _Greeting:
    """The first message of a process."""

    process: int
    processes: int
    host: str


def join_processes(
    cluster: Cluster, *, wait_seconds: float
) -> tuple[list[str], dict[int, Connection]]:
    """Meets the other processes.

    Returns:
        The hosts' names by process, and the connections: process 0 has one to each, the others one
        to process 0.

    Raises:
        Lost: processes did not come within ``wait_seconds``, with what each host saw.
        MaxlmError: they claim the same id, or disagree on their number; the port is taken.
    """
    me = _Greeting(cluster.process_id, cluster.num_processes, socket.gethostname())
    return (_accept_all if cluster.process_id == 0 else _connect)(cluster, me, wait_seconds)


def wait_for_process_0(cluster: Cluster, *, wait_seconds: float) -> None:
    """Waits until something listens again at process 0's port.

    Raises:
        Lost: not within ``wait_seconds``.
    """
    _reach(cluster, time.monotonic() + wait_seconds, lambda connection: connection).close()


def _accept_all(
    cluster: Cluster, me: _Greeting, seconds: float
) -> tuple[list[str], dict[int, Connection]]:
    """Process 0: listens until all have connected."""
    deadline = time.monotonic() + seconds
    greetings, connections, accepted = {0: me}, {}, []
    try:
        with _listen(cluster, deadline) as server:
            while len(greetings) < me.processes:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection = Connection(server.accept()[0])
                except TimeoutError:
                    _remove_closed(greetings, connections)
                    count, address = me.processes, cluster.coordinator
                    raise _missing_error(greetings, count, seconds, address) from None
                greeting = _parse_greeting(connection.receive(NOTICE_SECONDS))
                if greeting is None:  # not one of the run's processes
                    connection.close()
                    continue
                accepted.append(connection)
                if greeting.process in greetings or len(greetings) + 1 == me.processes:
                    # Before one counts as there twice, or all count as there.
                    _remove_closed(greetings, connections)
                _check_greeting(greeting, greetings)
                greetings[greeting.process] = greeting
                connections[greeting.process] = connection
    except MaxlmError as error:
        for connection in accepted:
            refused = [error.what, error.where, error.fix]
            connection.send({"refused": refused, "lost": isinstance(error, Lost)})
        raise
    hosts = [greetings[process].host for process in range(me.processes)]
    for connection in connections.values():
        connection.send({"hosts": hosts})
    return hosts, connections


def _remove_closed(greetings: dict[int, _Greeting], connections: dict[int, Connection]) -> None:
    """Removes processes that died while they waited; they are started again."""
    for process in [number for number, each in connections.items() if each.is_closed()]:
        del greetings[process], connections[process]


def _connect(
    cluster: Cluster, me: _Greeting, seconds: float
) -> tuple[list[str], dict[int, Connection]]:
    """Other processes: connect to process 0 until it answers, which it does once all are there."""

    def greet(connected: socket.socket) -> tuple[Connection, dict[str, Any]] | None:
        connection = Connection(connected)
        connection.send(vars(me))
        # Process 0 may start its own wait only now.
        answer = connection.receive(seconds + 2 * NOTICE_SECONDS) or {}
        if "hosts" in answer or "refused" in answer:
            return connection, answer
        connection.close()
        return None

    connection, answer = _reach(cluster, time.monotonic() + seconds, greet)
    if "refused" in answer:
        what, where, fix = answer["refused"]
        raise (Lost if answer["lost"] else MaxlmError)(what, where=where, fix=fix)
    return answer["hosts"], {0: connection}


def _parse_greeting(message: dict[str, Any] | None) -> _Greeting | None:
    try:
        return _Greeting(**(message or {}))
    except TypeError:
        return None


def _check_greeting(new: _Greeting, greetings: Mapping[int, _Greeting]) -> None:
    """
    Raises:
        MaxlmError: it contradicts those before.
    """
    lead = greetings[0]
    if new.processes != lead.processes:
        raise MaxlmError(
            f"processes disagree on how many they are: process {new.process} on {new.host} says "
            f"{new.processes}, process 0 on {lead.host} says {lead.processes}",
            fix="give all of them the same number",
        )
    if new.process in greetings:
        hosts = f"{greetings[new.process].host} and {new.host}"
        raise MaxlmError(
            f"two processes say that they are process {new.process}: on {hosts}",
            fix="give each a process id of its own",
        )


def _missing_error(
    greetings: Mapping[int, _Greeting], count: int, seconds: float, coordinator: str
) -> MaxlmError:
    came = ", ".join(f"{number} ({greetings[number].host})" for number in sorted(greetings)[:8])
    absent = [str(number) for number in range(count) if number not in greetings]
    missing = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if absent[8:] else "")
    return Lost(
        f"waited {seconds:g} s at {coordinator}: {len(greetings)} of {count} processes came: "
        f"{came}; missing: {missing}",
        fix="see the logs of the missing, and whether they can reach that address",
    )


def _listen(cluster: Cluster, deadline: float) -> socket.socket:
    """
    Raises:
        MaxlmError: the port is taken, for example by a run that does not end.
    """
    port = int(cluster.coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    while True:
        try:
            backlog = max(128, cluster.num_processes)
            return socket.create_server(
                ("", port), family=family, backlog=backlog, dualstack_ipv6=dual
            )
        except OSError as error:
            if time.monotonic() > deadline:
                what = f"process 0 on {socket.gethostname()} cannot listen on port {port}"
                fix = "end what uses it there, or choose another port"
                raise MaxlmError(f"{what}: {error.strerror}", fix=fix) from None
        time.sleep(_RETRY_SECONDS)


def _reach(cluster: Cluster, deadline: float, use: Callable[[socket.socket], Any]) -> Any:
    """Connects to process 0, and again while ``use`` returns None for the connection; returns what
    it returns.

    Raises:
        Lost: not by the deadline.
    """
    host, _, port = cluster.coordinator.rpartition(":")
    began = time.monotonic()
    while True:
        try:
            left = max(1.0, deadline - time.monotonic())
            connection = socket.create_connection((host.strip("[]"), int(port)), min(left, 10))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if (result := use(connection)) is not None:
                return result
            problem = "something there does not answer as process 0 would"
        except socket.gaierror:
            problem = "the name does not resolve"
        except ConnectionRefusedError:
            problem = "connection refused: nothing listens there"
        except TimeoutError:
            problem = "no answer from that host"
        except OSError as error:
            problem = str(error.strerror or error)
        if time.monotonic() > deadline:
            here = f"process {cluster.process_id} on {socket.gethostname()}"
            raise Lost(
                f"{here} cannot reach process 0 at {cluster.coordinator}: {problem} "
                f"(tried for {time.monotonic() - began:.0f} s)",
                fix="check that process 0 runs there, and that the port is open between the hosts",
            )
        time.sleep(_RETRY_SECONDS)
