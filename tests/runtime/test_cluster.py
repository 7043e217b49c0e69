"""Processes know their place, meet in a bounded time or say why not, and end when one
is gone."""

import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from maxlm.cli.common import make_cluster_variables
from maxlm.config import MaxlmError
from maxlm.config.errors import ProcessLost
from maxlm.runtime import cluster
from maxlm.runtime.cluster import Cluster, find_cluster, parse_first_host
from maxlm.runtime.rendezvous import join_processes
from maxlm.runtime.session import describe_lost_peer
from tests.ports import free_port
from tests.train import tiny
from tests.train.jobs import HERE, Process

WORKER = Path(__file__).with_name("peers_worker.py")

EXPLICIT = {
    "MAXLM_COORDINATOR": "a:1",
    "MAXLM_NUM_PROCESSES": "4",
    "MAXLM_PROCESS_ID": "3",
}
# As srun of SLURM 24.11 sets them for task 1 of the second of two nodes.
STEP = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
POD = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "w-0.job,w-1.job"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "w-0.first:8081",
}
VM = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:b:10.0.0.7,a:b:10.0.0.8,a:b:c",
}


def found(environ: dict[str, str], metadata: Mapping[str, str] = {}) -> Cluster | None:
    with mock.patch.object(cluster, "_read_attribute", metadata.get):
        return find_cluster(environ)


def test_the_most_explicit_place_wins():
    assert found({}) is None
    everything = STEP | POD | EXPLICIT
    assert found(everything) == Cluster("settings", "a:1", 4, 3)
    options = make_cluster_variables("b:2", None, 0)
    assert found(everything | options) == Cluster("settings", "b:2", 4, 0)
    assert found(STEP | POD) == Cluster(
        "SLURM", f"gpu007:{61440 + 4242 % 4096}", 4, 3, (1,)
    )
    # A network of its own for the coordinator.
    named = found(STEP | {"MAXLM_COORDINATOR": "gpu007-ib:900"})
    assert named == Cluster("SLURM", "gpu007-ib:900", 4, 3, (1,))
    assert found(POD) == Cluster("TPU pod", "w-0.job:8482", 2, 1)
    assert found(POD | SLICES) == Cluster("TPU pod", "w-0.first:8482", 4, 3)
    assert found({}, VM) == Cluster("TPU VM", "10.0.0.7:8482", 3, 2)
    text = "ACCELERATOR_TYPE: 'v5p-8'\n" + "\n".join(
        f"{k}: '{v}'" for k, v in SLICES.items()
    )
    sliced = found({}, VM | {"tpu-env": text})
    assert sliced == Cluster("TPU VM", "w-0.first:8482", 6, 5)


def test_a_process_alone_joins_nothing():
    assert found(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    batch_script = {k: v for k, v in STEP.items() if "STEP" not in k} | {
        "SLURM_NTASKS": "4"
    }
    assert found(batch_script) is None
    assert (
        found(EXPLICIT | {"MAXLM_NUM_PROCESSES": "1", "MAXLM_PROCESS_ID": "0"}) is None
    )
    assert found({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert found({"TPU_SKIP_MDS_QUERY": "1"}, VM) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1,node2", "node1"),
        ("gpu[001-003,7],login1", "gpu001"),
        ("rack[2-3]n[01-16].east,rack9", "rack2n01.east"),
    ],
)
def test_first_host(nodes, first):
    assert parse_first_host(nodes) == first


@pytest.mark.parametrize(
    ("more", "devices"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, (4, 5, 6, 7)),
        ({"SLURM_GPUS_ON_NODE": "2"}, (1,)),
        ({"SLURM_GPUS_ON_NODE": "1", "SLURM_GPUS_PER_TASK": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_GPUS_ON_NODE": "8"}, None),
    ],
)
def test_gpus_of_a_task(more, devices):
    cluster = found(STEP | more)
    assert cluster
    assert cluster.local_device_ids == devices


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"MAXLM_NUM_PROCESSES": "3"} | STEP,
            "--num-processes (MAXLM_NUM_PROCESSES) is 3, but --coordinator "
            "(MAXLM_COORDINATOR) and "
            "--process-id (MAXLM_PROCESS_ID) not set; SLURM's step has 4 tasks; set "
            "all three, or "
            "none (SLURM's are used then)",
        ),
        (
            EXPLICIT | {"MAXLM_COORDINATOR": "node1"},
            "settings: the coordinator 'node1' is no host with a port; write it as "
            "host:port, such "
            "as node1:8476",
        ),
        (
            EXPLICIT | {"MAXLM_PROCESS_ID": "x"},
            "MAXLM_PROCESS_ID: 'x' is no whole number",
        ),
    ],
)
def test_settings_that_are_no_place(environ, message):
    with pytest.raises(MaxlmError) as error:
        found(environ)
    assert str(error.value) == message


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's server, which says ``code`` and the last part of what it is asked
    for."""

    code = 200

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(self.path.rpartition("/")[2].encode())

    def log_message(self, *_):
        pass


def test_the_metadata_server_is_asked_where_there_are_tpus(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (tmp_path / "device").mkdir()
    (tmp_path / "bare").mkdir()  # in a sandbox, which hides what it is

    def ask(code, kind="0xff0000", vendor="0x1ae0"):
        Metadata.code = code
        (tmp_path / "device" / "vendor").write_text(f"{vendor}\n")
        (tmp_path / "device" / "class").write_text(f"{kind}\n")
        return cluster._read_attribute(
            "name", tmp_path, f"http://127.0.0.1:{server.server_port}"
        )

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert ask(200) == "name"
        assert ask(404) is None
        with pytest.raises(
            ProcessLost,
            match=r"/name: this machine's metadata cannot be read \(HTTP Err",
        ):
            ask(503)
        assert ask(503, vendor="0x10de") is None
        # A machine with GPUs, on Google's own network card and disk.
        assert ask(503, kind="0x020000") is None
        assert ask(503, kind="0x010802") is None
        server.shutdown()


def meet(
    port: int, *processes: tuple[int, int], wait: float = 60, facts: Any = None
) -> list[Any]:
    """What processes, given by (id, number of all), end with: hosts' names, or the
    error."""

    def join(process: int, count: int) -> Any:
        place = Cluster("", f"127.0.0.1:{port}", count, process)
        process_facts = (facts or {}).get(process, {})
        try:
            return join_processes(place, process_facts, wait_seconds=wait)[0]
        except MaxlmError as error:
            return type(error), str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(join, *zip(*processes, strict=True)))


@contextmanager
def stranger(port: int) -> Iterator[None]:
    """Something else on the port, which hangs up with words of its own."""
    with socket.create_server(("127.0.0.1", port)) as server:

        def answer() -> None:
            for words in (
                b"HTTP/1.1 400 Bad Request\r\n\r\n",
                *[b'{"status": "ok"}\n'] * 999,
            ):
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.sendall(words)

        threading.Thread(target=answer, daemon=True).start()
        yield
        server.shutdown(socket.SHUT_RDWR)  # wakes accept


def call(port: int, words: bytes) -> None:
    """Say something to whoever listens, as soon as somebody does, and hang up."""
    deadline = time.monotonic() + 300
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as caller:
                return caller.sendall(words)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def greeting(process: int, count: int) -> bytes:
    call = {"process": process, "count": count, "host": "dead", "facts": {}}
    return json.dumps(call).encode() + b"\n"


def test_processes_meet_among_strangers_and_those_that_died_while_they_waited():
    """On one port, which something else holds at first, and which others call too."""
    port = free_port()
    with ThreadPoolExecutor() as pool:
        with stranger(port):
            early = pool.submit(meet, port, (1, 4), (0, 4))
            time.sleep(0.5)
        call(port, b"GET / HTTP/1.1\r\n\r\n")
        call(port, greeting(2, 4))
        late = pool.submit(meet, port, (3, 4), (2, 4))
        assert early.result() == late.result() == [[HERE] * 4] * 2


@pytest.mark.heavy
def test_missing_processes():
    port = free_port()
    with ThreadPoolExecutor() as pool:
        met = pool.submit(meet, port, (0, 5), (2, 5), wait=2)
        call(port, greeting(1, 5))
        message = (
            f"waited 2 s at 127.0.0.1:{port}: 2 of 5 processes came: 0 ({HERE}), 2 "
            f"({HERE}); "
            "missing: 1, 3, 4; see the logs of the missing, and whether they can reach "
            "that address"
        )
        assert met.result() == [(ProcessLost, message)] * 2


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        (
            [(0, 3), (1, 3), (1, 3)],
            f"two processes say that they are process 1: on {HERE} and {HERE}; give "
            f"each a process "
            "id of its own",
        ),
        (
            [(0, 2), (1, 3)],
            f"processes disagree on how many they are: process 1 on {HERE} says 3, "
            f"process 0 on "
            f"{HERE} says 2; give all of them the same number",
        ),
    ],
)
def test_processes_that_contradict_each_other(processes, message):
    assert meet(free_port(), *processes) == [(MaxlmError, message)] * len(processes)


def test_processes_of_different_settings():
    same = {"a": 1, "jaxlib": "0.9"}
    facts = {0: same, 1: same | {"jaxlib": "0.8", "b": [2]}, 2: same}
    message = (
        f"hosts disagree on jaxlib: 0.9 on process 0 ({HERE}) and process 2 ({HERE}); "
        f"0.8 on "
        f"process 1 ({HERE}); and on b; start all hosts with the same software, config "
        f"and kind of "
        "machine"
    )
    assert (
        meet(free_port(), (0, 3), (1, 3), (2, 3), facts=facts)
        == [(MaxlmError, message)] * 3
    )


def test_process_0_out_of_reach():
    port = free_port()
    problem = "Connection refused"
    [(kind, text)] = meet(port, (1, 2), wait=1)
    words = f"process 1 on {HERE} cannot reach process 0 at 127.0.0.1:{port}: {problem} (tried for "
    assert (kind, text[: len(words)]) == (ProcessLost, words)


def test_the_port_of_another():
    port = free_port()
    with stranger(port):
        (_, lead), (_, other) = meet(port, (0, 2), (1, 2), wait=1)
    assert lead.startswith(
        f"process 0 on {HERE} cannot listen on port {port}: Address already in"
    )
    assert (
        f"127.0.0.1:{port}: something there does not answer as process 0 would" in other
    )


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., list[Process]]]:
    """Start all processes of a cluster, each with what it does, and wait until they
    have met and added up; none outlives the test."""
    started: list[Process] = []

    def begin(*actions: str) -> list[Process]:
        port = free_port()
        count = len(actions)
        for number, action in enumerate(actions):
            environ = tiny.environment(tmp_path) | {
                # clusters have one; this leads nowhere
                "http_proxy": "http://127.0.0.1:9",
                "MAXLM_COORDINATOR": f"127.0.0.1:{port}",
                "MAXLM_NUM_PROCESSES": str(count),
                "MAXLM_PROCESS_ID": str(number),
            }
            command = [sys.executable, WORKER, action]
            started.append(Process(command, tmp_path / str(number), environ))
        for process in started:
            output = process.out
            process.until(lambda file=output: f"of {count}: " in file.read_text())
        return started

    yield begin
    for process in started:
        process.end()


@pytest.mark.more
@pytest.mark.heavy
def test_a_killed_process_0_ends_the_others_busy_or_not(start):
    """JAX, which needs no turn in Python, would abort the busy one without a word."""
    processes = start("loop", "loop", "busy")
    processes[0].send(signal.SIGKILL)
    line = (
        f"error: process 0 ({HERE}) is gone; the state is that of the last checkpoint"
    )
    for number in (1, 2):
        code, output, err = processes[number].ended()
        assert f"process {number} of 3: 6" in output
        assert (code, line in err) == (76, True), err


@pytest.mark.more
def test_process_0_that_still_works_notices_that_one_which_is_done_is_killed(start):
    """JAX would abort it."""
    processes = start("late", "late")
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for the other
        processes[1].ended(1)
    processes[1].send(signal.SIGKILL)
    assert processes[0].ended()[0] == 76


@pytest.mark.heavy
def test_a_mistake_found_by_one_process_ends_all_alike(start):
    healthy, faulty = start("loop", "fault")
    healthy_code, _, healthy_errors = healthy.ended()
    faulty_code, faulty_output, _ = faulty.ended()
    assert (healthy_code, faulty_code) == (2, 2)
    fault = "data.folder: no such folder"
    assert healthy_errors[-1] == f"error: process 1 ({HERE}): {fault}"
    assert faulty_output[-1] == fault


def test_errors_of_collectives():
    gloo = "UNKNOWN: Gloo all-reduce failed: [tcp/pair.cc:538] Read error [::1]:1: Connection reset"
    assert "a peer cannot be reached" in (describe_lost_peer(ValueError(gloo)) or "")
    assert describe_lost_peer(ValueError("shapes (2,) and (3,) do not match")) is None
    assert describe_lost_peer(OSError("Connection reset by peer")) is None
