"""The processes of a run meet, agree, and notice when one of them is gone.

JAX's own service does the first and the last, but ends the process from C++, without a word on who
was missing, and lets processes that disagree on their number go on. So each process first calls
process 0 (``rendezvous.py``) and holds the line for as long as it runs: the operating system closes
it when a process dies, and TCP's probes find a host that is silent.
"""

import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NoReturn

from maxlm.config import ABSENT, MaxlmError
from maxlm.config.errors import LOST, Lost
from maxlm.runtime.cluster import Cluster
from maxlm.runtime.rendezvous import MOMENT, Line, await_lead, meet

FAILED = 1


class Peers:
    """The other processes of a run; made by ``join_cluster``."""

    def __init__(self, cluster: Cluster, hosts: list[str], lines: Mapping[int, Line]):
        self.cluster, self.hosts = cluster, hosts
        self._lines = lines  # process 0 has one to each, the others one to it
        self._told: queue.Queue[tuple[int, Any]] = queue.Queue()
        self._ending, self._lead_left = threading.Lock(), threading.Event()
        for number, line in lines.items():
            threading.Thread(target=self._listen, args=(number, line), daemon=True).start()

    def check(self, facts: Mapping[str, Any], *, wait_seconds: float) -> None:
        """Compare facts (JSON values by name) that must be the same on all processes, which call
        this in the same order.

        Raises:
            MaxlmError: on all alike: those that differ, with what each host said; a process that
                said nothing within ``wait_seconds``.
        """
        differing = self._exchange(dict(facts), wait_seconds)
        if not differing:
            return
        name, *others = differing
        said: dict[str, list[int]] = {}
        for process, value in enumerate(differing[name]):
            text = value if isinstance(value, str) else json.dumps(value)
            said.setdefault(text, []).append(process)
        words = [f"{text[:200]} on {self._named(who)}" for text, who in said.items()]
        if others:
            more = f" and {len(others) - 4} more" if len(others) > 4 else ""
            words.append(f"and on {', '.join(others[:4])}{more}")
        error = MaxlmError(
            f"hosts disagree on {name}: {'; '.join(words)}",
            fix="start all hosts with the same software, config and kind of machine",
        )
        error.on_all_processes = True
        raise error

    def leave(self) -> None:
        """Say that this process is done, as agreed among all; it may then exit with any code, for
        which JAX waits until the others have left too. Process 0, which may have files to copy, is
        the first: JAX would abort it if one that has left were killed."""
        if self.cluster.process_id:
            self._lead_left.wait()
        self._tell({"left": True})

    def end_all(self, code: int, text: str) -> NoReturn:
        """End this process at once, and so the others, which print ``text``, with the same code.

        After FAILED and LOST it waits a moment: if the fault was only that a peer is gone, the
        process ends in the meantime as ``join_cluster`` says.
        """
        if code in (FAILED, LOST):
            time.sleep(MOMENT)
        self._end(code, f"{self._named([self.cluster.process_id])}: {text}", None)

    def _exchange(self, facts: dict[str, Any], seconds: float) -> dict[str, list[Any]]:
        """Return the facts that not all processes agree on: name → each process's value."""
        me, lead = self.cluster.process_id, self.cluster.process_id == 0
        if not lead:
            self._tell({"facts": facts})
        everyone: dict[int, Any] = {me: facts}
        deadline = time.monotonic() + seconds + (0 if lead else MOMENT)
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
        names = dict.fromkeys(name for each in ordered for name in each)
        said = {name: [each.get(name, ABSENT) for each in ordered] for name in names}
        differing = {k: v for k, v in said.items() if any(each != v[0] for each in v)}
        self._tell({"facts": differing})
        return differing

    def _listen(self, number: int, line: Line) -> None:
        left = False
        while message := line.receive(None):
            if "facts" in message:
                self._told.put((number, message["facts"]))
            elif "left" in message:
                left = True
                self._lead_left.set()  # of no use on process 0
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
            time.sleep(MOMENT / 2)  # JAX ends processes rudely when its service is gone
        # Nobody may read what is written, or another thread hold its lock.
        timer = threading.Timer(MOMENT, os._exit, [code])
        timer.daemon = True
        timer.start()
        if told_by is not None:
            with suppress(OSError):
                os.write(2, f"error: {text}\n".encode())
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
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
        Lost: processes that did not come; with what each host saw; JAX's runtime did not start.
        MaxlmError: they claim the same id, or disagree on their number or on the versions of maxlm
            and jax.
    """
    hosts, lines = meet(cluster, wait_seconds=wait_seconds)
    for line in lines.values():
        line.hold(0.8 * peer_seconds)
    peers = Peers(cluster, hosts, lines)
    versions = {name: version(name) for name in ("maxlm", "jax", "jaxlib")}
    try:
        peers.check(versions, wait_seconds=wait_seconds)
    except MaxlmError:
        peers.leave()  # they raise the same
        raise
    if cluster.process_id:
        await_lead(cluster, wait_seconds=wait_seconds)  # JAX's service is to listen there now
    try:
        _start_jax(cluster, wait_seconds, peer_seconds)
    except RuntimeError as error:
        what = f"JAX's distributed runtime did not start ({' '.join(str(error).split())[:200]})"
        raise Lost(what, fix="start the processes again") from error
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
