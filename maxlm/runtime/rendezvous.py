"""How the processes of a run meet: each calls process 0, on the port that JAX is given afterwards,
which answers when it has heard all.

The connections stay: see ``peers.py``.
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

MOMENT = 2.0  # seconds in which the others' news arrive
_PAUSE = 0.2  # between two tries to reach process 0
_LONGEST = 1 << 24  # bytes of a message: a config with many sources is one


class Line:
    """Messages, JSON objects on a line each, over one connection."""

    def __init__(self, connection: socket.socket):
        self._connection, self._reader = connection, connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        # Whoever does not get it is gone, which its reader notices.
        with self._lock, suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None) -> dict[str, Any] | None:
        """None: closed, silent for so long, or no message of ours."""
        self._connection.settimeout(seconds)
        try:
            message = json.loads(self._reader.readline(_LONGEST))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def gone(self) -> bool:
        """Whether nobody holds the other end."""
        self._connection.settimeout(0)
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self._connection.settimeout(MOMENT)  # for what is sent

    def hold(self, seconds: float) -> None:
        """Let the kernel close it if the other host is silent for so long, even while Python is
        busy."""
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        settings = {
            "TCP_KEEPIDLE": max(1, round(seconds / 2)),
            "TCP_KEEPINTVL": max(1, round(seconds / 8)),
            "TCP_KEEPCNT": 4,
            "TCP_USER_TIMEOUT": round(seconds * 1000),
        }
        for name, value in settings.items():
            if option := getattr(socket, name, None):  # Linux has them all
                self._connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def close(self) -> None:
        self._reader.close()
        self._connection.close()


@dataclass(frozen=True)
class _Call:
    """What a process says first."""

    process: int
    processes: int
    host: str


def meet(cluster: Cluster, *, wait_seconds: float) -> tuple[list[str], dict[int, Line]]:
    """Meet the other processes.

    Returns:
        The hosts' names by process, and the lines: of process 0 one to each, of the others one to
        process 0.

    Raises:
        Lost: processes that did not come within ``wait_seconds``; with what each host saw.
        MaxlmError: they claim the same id, or disagree on their number; the port is taken.
    """
    me = _Call(cluster.process_id, cluster.num_processes, socket.gethostname())
    return (_answer if cluster.process_id == 0 else _call)(cluster, me, wait_seconds)


def await_lead(cluster: Cluster, *, wait_seconds: float) -> None:
    """Wait until something listens again at process 0's port.

    Raises:
        Lost: not within ``wait_seconds``.
    """
    _reach(cluster, time.monotonic() + wait_seconds, lambda connection: connection).close()


def _answer(cluster: Cluster, me: _Call, seconds: float) -> tuple[list[str], dict[int, Line]]:
    """Process 0: listen until all have called."""
    deadline = time.monotonic() + seconds
    calls, lines, callers = {0: me}, {}, []
    try:
        with _listening(cluster, deadline) as server:
            while len(calls) < me.processes:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    line = Line(server.accept()[0])
                except TimeoutError:
                    _forget_gone(calls, lines)
                    raise _missing(calls, me.processes, seconds, cluster.coordinator) from None
                call = _understood(line.receive(MOMENT))
                if call is None:  # a stranger
                    line.close()
                    continue
                callers.append(line)
                if call.process in calls or len(calls) + 1 == me.processes:
                    # Before one is said to be there twice, or all to be there.
                    _forget_gone(calls, lines)
                _check_call(call, calls)
                calls[call.process], lines[call.process] = call, line
    except MaxlmError as error:
        for line in callers:
            refused = [error.what, error.where, error.fix]
            line.send({"refused": refused, "lost": isinstance(error, Lost)})
        raise
    hosts = [calls[number].host for number in range(me.processes)]
    for line in lines.values():
        line.send({"hosts": hosts})
    return hosts, lines


def _forget_gone(calls: dict[int, _Call], lines: dict[int, Line]) -> None:
    """Those that died while they waited; they are started again."""
    for number in [number for number, line in lines.items() if line.gone()]:
        del calls[number], lines[number]


def _call(cluster: Cluster, me: _Call, seconds: float) -> tuple[list[str], dict[int, Line]]:
    """Another process: call process 0 until it answers, and wait until it has heard all."""

    def asked(connection: socket.socket) -> tuple[Line, dict[str, Any]] | None:
        line = Line(connection)
        line.send(vars(me))
        # It may have begun to wait only now.
        answer = line.receive(seconds + 2 * MOMENT) or {}
        if "hosts" in answer or "refused" in answer:
            return line, answer
        line.close()
        return None

    line, answer = _reach(cluster, time.monotonic() + seconds, asked)
    if "refused" in answer:
        what, where, fix = answer["refused"]
        raise (Lost if answer["lost"] else MaxlmError)(what, where=where, fix=fix)
    return answer["hosts"], {0: line}


def _understood(message: dict[str, Any] | None) -> _Call | None:
    try:
        return _Call(**(message or {}))
    except TypeError:
        return None


def _check_call(call: _Call, calls: Mapping[int, _Call]) -> None:
    """
    Raises:
        MaxlmError: it does not fit to those before.
    """
    lead = calls[0]
    if call.processes != lead.processes:
        raise MaxlmError(
            f"processes disagree on how many they are: process {call.process} on {call.host} says "
            f"{call.processes}, process 0 on {lead.host} says {lead.processes}",
            fix="give all of them the same number",
        )
    if call.process in calls:
        hosts = f"{calls[call.process].host} and {call.host}"
        raise MaxlmError(
            f"two processes say that they are process {call.process}: on {hosts}",
            fix="give each a process id of its own",
        )


def _missing(
    calls: Mapping[int, _Call], count: int, seconds: float, coordinator: str
) -> MaxlmError:
    came = ", ".join(f"{number} ({calls[number].host})" for number in sorted(calls)[:8])
    absent = [str(number) for number in range(count) if number not in calls]
    missing = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if absent[8:] else "")
    return Lost(
        f"waited {seconds:g} s at {coordinator}: {len(calls)} of {count} processes came: {came}; "
        f"missing: {missing}",
        fix="see the logs of the missing, and whether they can reach that address",
    )


def _listening(cluster: Cluster, deadline: float) -> socket.socket:
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
        time.sleep(_PAUSE)


def _reach(cluster: Cluster, deadline: float, use: Callable[[socket.socket], Any]) -> Any:
    """What ``use`` makes of a connection to process 0; one that it returns None of is tried anew.

    Raises:
        Lost: none by the deadline.
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
        time.sleep(_PAUSE)
