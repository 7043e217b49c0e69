"""The processes of a run find each other, agree, and notice when one of them is gone.

JAX's own service does the first and the last, but ends the process from C++, without a word on who
was missing, and lets processes that disagree on their number go on. So each process first calls
process 0, on the port that JAX is given afterwards, and holds the line for as long as it runs: the
operating system closes it when a process dies, and TCP's probes find a host that is silent.
"""

import json
import os
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NoReturn

from maxlm.config import MaxlmError
from maxlm.config.errors import LOST
from maxlm.programs.cluster import Cluster

FAILED = 1
_PAUSE = 0.2  # between two tries to reach process 0
_MOMENT = 2.0  # in which the others' news arrive
_LONGEST = 1 << 20  # bytes of a message


class Lost(MaxlmError):
    """Not a mistake of the user's: processes that did not come, or died on the way."""

    exit_code = LOST


class _Line:
    """Messages, JSON objects on a line each, over one connection."""

    def __init__(self, connection: socket.socket):
        self.connection, self.reader = connection, connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        # Whoever does not get it is gone, which its reader notices.
        with self._lock, suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None) -> dict[str, Any] | None:
        """None: closed, silent for so long, or no message of ours."""
        self.connection.settimeout(seconds)
        try:
            message = json.loads(self.reader.readline(_LONGEST))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self.reader.close()
        self.connection.close()


@dataclass(frozen=True)
class _Call:
    """What a process says first."""

    process: int
    processes: int
    host: str


class Peers:
    """The other processes of a run; made by ``join_cluster``."""

    def __init__(self, cluster: Cluster, hosts: list[str], lines: Mapping[int, _Line]):
        self.cluster, self.hosts = cluster, hosts
        self._lines = lines  # process 0 has one to each, the others one to it
        self._told: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._ending = threading.Lock()
        for number, line in lines.items():
            threading.Thread(target=self._listen, args=(number, line), daemon=True).start()

    def check(self, facts: Mapping[str, Any], *, wait_seconds: float) -> None:
        """Compare facts (JSON values by name) that must be the same on all processes, which call
        this in the same order.

        Raises:
            MaxlmError: on all alike: those that differ, with what each host said; a process that
                said nothing within ``wait_seconds``.
        """
        everyone = self._exchange(dict(facts), wait_seconds)
        for name in everyone[0]:
            said: dict[str, list[int]] = {}
            for process, each in enumerate(everyone):
                said.setdefault(str(each.get(name)), []).append(process)
            if len(said) > 1:
                words = "; ".join(f"{value} on {self._named(who)}" for value, who in said.items())
                fix = "start all hosts with the same software, config and kind of machine"
                raise MaxlmError(f"hosts disagree on {name}: {words}", fix=fix)

    def leave(self) -> None:
        """Say that this process is done, as agreed among all; it may then exit with any code, for
        which JAX waits until the others have left too."""
        self._tell({"left": True})

    def end_all(self, code: int, text: str) -> NoReturn:
        """End this process at once, and so the others, which print ``text``, with the same code.

        After FAILED and LOST it waits a moment: if the fault was only that a peer is gone, the
        process ends in the meantime as ``join_cluster`` says.
        """
        if code in (FAILED, LOST):
            time.sleep(_MOMENT)
        self._end(code, f"{self._named([self.cluster.process_id])}: {text}", None)

    def _exchange(self, facts: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
        me, lead = self.cluster.process_id, self.cluster.process_id == 0
        if not lead:
            self._tell({"facts": facts})
        everyone: dict[int, Any] = {me: facts}
        deadline = time.monotonic() + seconds + (0 if lead else _MOMENT)
        while len(everyone) <= len(self._lines):
            try:
                number, told = self._told.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                silent = self._named([each for each in self._lines if each not in everyone])
                what = f"waited {seconds:g} s for what {silent} had to say"
                raise Lost(what, fix="see the log there") from None
            everyone[number] = told
        if not lead:
            return everyone[0]
        ordered = [everyone[number] for number in sorted(everyone)]
        self._tell({"facts": ordered})
        return ordered

    def _listen(self, number: int, line: _Line) -> None:
        left = False
        while message := line.receive(None):
            if "facts" in message:
                self._told.put((number, message["facts"]))
            elif "left" in message:
                left = True
            elif "ended" in message:
                self._end(int(message["ended"]), str(message.get("text")), number)
        if not left:
            state = "the state is that of the last checkpoint"
            self._end(LOST, f"{self._named([number])} is gone; {state}", number)

    def _end(self, code: int, text: str, told_by: int | None) -> NoReturn:
        """End this process, and by telling them, the others."""
        self._ending.acquire()  # once: the first reason is the cause of the others
        self._tell({"ended": code, "text": text}, leaving_out=told_by)
        if self.cluster.process_id == 0:
            time.sleep(_MOMENT / 2)  # JAX ends processes rudely when its service is gone
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        if told_by is not None:
            with suppress(OSError):  # not print: another thread may hold its lock
                os.write(2, f"error: {text}\n".encode())
        os._exit(code)  # the normal way out would wait for the peers

    def _tell(self, message: Mapping[str, Any], leaving_out: int | None = None) -> None:
        for number, line in self._lines.items():
            if number != leaving_out:
                line.send(message)

    def _named(self, processes: list[int]) -> str:
        return " and ".join(f"process {each} ({self.hosts[each]})" for each in processes[:4]) + (
            f" and {len(processes) - 4} more" if len(processes) > 4 else ""
        )


def join_cluster(cluster: Cluster, *, wait_seconds: float, peer_seconds: float) -> Peers:
    """Meet the other processes and start JAX's distributed runtime, before any other use of JAX.

    From here on this process ends, with a line on stderr and code LOST, when a peer dies before it
    has left, or its host is silent for ``peer_seconds``; or as a peer says (``end_all``). When a
    process is there but stopped, JAX's own service aborts the others (SIGABRT, with a report).

    Args:
        wait_seconds: how long to wait for process 0, and it for the others.
        peer_seconds: how long a host may be silent, at least 10.

    Raises:
        Lost: processes that did not come; with what each host saw.
        MaxlmError: they claim the same id, or disagree on their number or on the versions of maxlm
            and jax.
    """
    me = _Call(cluster.process_id, cluster.num_processes, socket.gethostname())
    meet = _answer if cluster.process_id == 0 else _call
    hosts, lines = meet(cluster, me, wait_seconds)
    for line in lines.values():
        line.connection.settimeout(None)
        _probe(line.connection, 0.8 * peer_seconds)
    peers = Peers(cluster, hosts, lines)
    versions = {name: version(name) for name in ("maxlm", "jax", "jaxlib")}
    try:
        peers.check(versions, wait_seconds=wait_seconds)
    except MaxlmError:
        peers.leave()  # they raise the same
        raise
    if cluster.process_id:
        _reach(cluster, time.monotonic() + wait_seconds, lambda connection: connection).close()
    _start_jax(cluster, wait_seconds, peer_seconds)
    return peers


def lost_peer(error: BaseException) -> str | None:
    """One line for an error of a collective whose peer, or the network to it, is gone.

    None for any other error. ``Peers`` mostly knows better who is gone: see ``Peers.end_all``.
    """
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError", "ValueError"):
        return None
    text = " ".join(str(error).split())
    signs = r"gloo|nccl|socket closed|connection (reset|closed|refused)|coordination ?service"
    if not re.search(signs, text, re.IGNORECASE):
        return None
    return f"a peer cannot be reached; the state is that of the last checkpoint ({text[:200]})"


def _answer(cluster: Cluster, me: _Call, seconds: float) -> tuple[list[str], dict[int, _Line]]:
    """Process 0: listen until all have called."""
    deadline = time.monotonic() + seconds
    calls, lines, callers = {0: me}, {}, []
    try:
        with _listening(cluster, deadline) as server:
            while len(calls) < me.processes:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    line = _Line(server.accept()[0])
                except TimeoutError:
                    raise _missing(calls, me.processes, seconds, cluster.coordinator) from None
                call = _understood(line.receive(_MOMENT))
                if call is None:  # a stranger
                    line.close()
                    continue
                callers.append(line)
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


def _call(cluster: Cluster, me: _Call, seconds: float) -> tuple[list[str], dict[int, _Line]]:
    """Another process: call process 0 until it answers, and wait until it has heard all."""

    def asked(connection: socket.socket) -> tuple[_Line, dict[str, Any]] | None:
        line = _Line(connection)
        line.send(vars(me))
        # It may have begun to wait only now.
        if answer := line.receive(seconds + 2 * _MOMENT):
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
        MaxlmError: not before the deadline.
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


def _probe(connection: socket.socket, seconds: float) -> None:
    """Let the kernel find out that the other host is silent, even while Python is busy."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = {
        "TCP_KEEPIDLE": max(1, round(seconds / 2)),
        "TCP_KEEPINTVL": max(1, round(seconds / 8)),
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": round(seconds * 1000),
    }
    for name, value in settings.items():
        if option := getattr(socket, name, None):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _start_jax(cluster: Cluster, wait_seconds: float, peer_seconds: float) -> None:
    import ctypes
    import signal

    import jax

    # A proxy set for the web is no way to a host beside this one; gRPC would take it, and hang.
    host = cluster.coordinator.rpartition(":")[0].strip("[]")
    exempt = filter(None, (os.environ.get("no_grpc_proxy"), host))  # noqa: SIM112
    os.environ["no_grpc_proxy"] = ",".join(exempt)  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's client aborts the process as soon as process 0 is gone, at the same time as our own
    # thread learns of it. The thread needs the time to say so: the C function sleep, as a handler,
    # gets the signal's number for its seconds, 6, and then abort() goes on. No Python handler would
    # do, they run in the main thread, which waits for a collective.
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), None
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        cluster.local_device_ids,
        cluster_detection_method="deactivate",  # or SLURM would mean one GPU a process
        initialization_timeout=max(1, round(wait_seconds)),
        heartbeat_timeout_seconds=max(1, round(peer_seconds)),
        shutdown_timeout_seconds=86400,  # process 0 may have files to copy when all is done
    )
