"""Processes know their place, meet in a bounded time or say why not, and end when one is gone."""

import http.server
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from maxlm.config import MaxlmError
from maxlm.config.errors import Lost
from maxlm.runtime import cluster
from maxlm.runtime.cluster import Cluster, find_cluster, parse_first_host
from maxlm.runtime.peers import describe_lost_peer
from tests.ports import free_port
from tests.programs import tiny

WORKER = Path(__file__).with_name("peers_worker.py")
HERE = socket.gethostname()

EXPLICIT = {"MAXLM_COORDINATOR": "a:1", "MAXLM_NUM_PROCESSES": "4", "MAXLM_PROCESS_ID": "3"}
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
VM = {"agent-worker-number": "2", "worker-network-endpoints": "a:b:10.0.0.7,a:b:10.0.0.8,a:b:c"}


def nowhere(name: str) -> None:
    return None


def found(environ: dict[str, str], **arguments) -> Cluster | None:
    return find_cluster(environ, **{"metadata": nowhere, **arguments})


def test_the_most_explicit_place_wins():
    assert found({}) is None
    everything = STEP | POD | EXPLICIT
    assert found(everything) == Cluster("settings", "a:1", 4, 3)
    assert found(everything, coordinator="b:2", process_id=0) == Cluster("settings", "b:2", 4, 0)
    assert found(STEP | POD) == Cluster("SLURM", f"gpu007:{61440 + 4242 % 4096}", 4, 3, (1,))
    # A network of its own for the coordinator.
    named = found(STEP | {"MAXLM_COORDINATOR": "gpu007-ib:900"})
    assert named == Cluster("SLURM", "gpu007-ib:900", 4, 3, (1,))
    assert found(POD) == Cluster("TPU pod", "w-0.job:8482", 2, 1)
    assert found(POD | SLICES) == Cluster("TPU pod", "w-0.first:8482", 4, 3)
    assert found({}, metadata=VM.get) == Cluster("TPU VM", "10.0.0.7:8482", 3, 2)
    text = "ACCELERATOR_TYPE: 'v5p-8'\n" + "\n".join(f"{k}: '{v}'" for k, v in SLICES.items())
    sliced = found({}, metadata=(VM | {"tpu-env": text}).get)
    assert sliced == Cluster("TPU VM", "w-0.first:8482", 6, 5)


def test_a_process_alone_joins_nothing():
    assert found(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    batch_script = {k: v for k, v in STEP.items() if "STEP" not in k} | {"SLURM_NTASKS": "4"}
    assert found(batch_script) is None
    assert found(EXPLICIT | {"MAXLM_NUM_PROCESSES": "1", "MAXLM_PROCESS_ID": "0"}) is None
    assert found({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert found({"TPU_SKIP_MDS_QUERY": "1"}, metadata=VM.get) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[001-003,7],login1", "gpu001"),
        ("gpu[3,5-9]", "gpu3"),
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
    ("environ", "arguments", "message"),
    [
        (
            {"MAXLM_NUM_PROCESSES": "3"} | STEP,
            {},
            "--num-processes (MAXLM_NUM_PROCESSES) is 3, but --coordinator (MAXLM_COORDINATOR) and "
            "--process-id (MAXLM_PROCESS_ID) not set; SLURM's step has 4 tasks; set all three, or "
            "none (SLURM's are used then)",
        ),
        (
            {},
            {"coordinator": "a:1", "num_processes": 2},
            "--coordinator (MAXLM_COORDINATOR) is a:1, --num-processes (MAXLM_NUM_PROCESSES) is 2, "
            "but --process-id (MAXLM_PROCESS_ID) not set; set all three, or none",
        ),
        (
            EXPLICIT,
            {"num_processes": 3},
            "settings: process id 3 is not below the number of processes, 3; number them 0 to 2",
        ),
        (
            EXPLICIT,
            {"coordinator": "node1"},
            "settings: the coordinator 'node1' is no host with a port; write it as host:port, such "
            "as node1:8476",
        ),
        (EXPLICIT | {"MAXLM_PROCESS_ID": "x"}, {}, "MAXLM_PROCESS_ID: 'x' is no whole number"),
    ],
)
def test_settings_that_are_no_place(environ, arguments, message):
    with pytest.raises(MaxlmError) as error:
        found(environ, **arguments)
    assert str(error.value) == message


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's server; ``answers`` are what it says next, the last one for good."""

    answers: ClassVar[list[int]] = []

    def do_GET(self):
        code = self.answers.pop(0) if self.answers[1:] else self.answers[0]
        assert self.headers["Metadata-Flavor"] == "Google"
        self.send_response(code)
        self.end_headers()
        self.wfile.write(self.path.rpartition("/")[2].encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(tmp_path, monkeypatch):
    """What an attribute is said to be, on a machine with a TPU, by a server that answers so."""
    monkeypatch.setattr(cluster, "_PAUSES", (0, 0, 0))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    device = tmp_path / "0000:00:05.0"
    device.mkdir()
    (device / "vendor").write_text("0x1ae0\n")
    (device / "class").write_text("0xff0000\n")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(*answers):
        Metadata.answers = list(answers)
        return cluster._attribute("name", tmp_path, f"http://127.0.0.1:{server.server_port}")

    yield ask
    server.shutdown()
    server.server_close()


def test_a_metadata_server_that_does_not_answer_at_once_is_asked_again(metadata, tmp_path):
    assert metadata(200) == "name"
    assert metadata(503, 503, 200) == "name"
    assert metadata(404) is None
    with pytest.raises(
        Lost, match=r"/name: this machine's metadata cannot be read \(HTTP Error 503"
    ):
        metadata(503)
    (tmp_path / "0000:00:05.0" / "class").write_text("0x020000\n")  # a network card of Google's
    assert metadata(503) is None


class Worker:
    """A process of ``peers_worker.py``."""

    def __init__(
        self, folder: Path, port: int, number: int, action: str, host="127.0.0.1", **settings
    ):
        self.log = folder / f"{number}-{time.monotonic_ns()}.log"
        options = {"count": 2, "wait": 120, "silent": 10} | settings
        environ = tiny.environment(folder) | {
            "http_proxy": "http://127.0.0.1:9",  # clusters have one; this leads nowhere
            "MAXLM_COORDINATOR": f"{host}:{port}",
            "MAXLM_NUM_PROCESSES": str(options["count"]),
            "MAXLM_PROCESS_ID": str(number),
            "FACT": str(options.get("fact")),
        }
        if path := options.get("path"):
            environ["PYTHONPATH"] = f"{path}:{environ['PYTHONPATH']}"
        command = [sys.executable, WORKER, str(options["wait"]), str(options["silent"]), action]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)

    def text(self) -> str:
        return self.log.read_text()

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """Its exit code and all that it wrote."""
        return self.process.wait(seconds), self.text()

    def wait_for(self, words: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Worker]]:
    """Start workers; none outlives the test."""
    workers = []

    def begin(*arguments, **settings) -> Worker:
        workers.append(Worker(tmp_path, *arguments, **settings))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.process.kill()
        worker.process.wait()


@contextmanager
def stranger(port: int) -> Iterator[None]:
    """Something else on the port, which hangs up with words of its own."""
    words = itertools.cycle([b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"status": "ok"}\n'])
    with socket.create_server(("127.0.0.1", port)) as server:

        def answer() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.sendall(next(words))

        threading.Thread(target=answer, daemon=True).start()
        yield
        server.shutdown(socket.SHUT_RDWR)  # wakes accept


def connected(port: int) -> socket.socket:
    """As soon as somebody listens there."""
    deadline = time.monotonic() + 300
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def call_and_die(port: int, process: int, *, count: int) -> None:
    """What process 0 hears of a process that is killed while it waits for the others."""
    with connected(port) as caller:
        call = {"process": process, "processes": count, "host": HERE}
        caller.sendall(json.dumps(call).encode() + b"\n")


def test_processes_meet_among_strangers(start):
    """On one port, which something else holds at first, and which others call too."""
    port = free_port()
    with stranger(port):
        workers = [start(port, number, "once", count=3) for number in (1, 0)]
        time.sleep(1.5)
    with connected(port) as caller:
        caller.sendall(b"GET / HTTP/1.1\r\n\r\n")
        workers.append(start(port, 2, "once", count=3))
        for number, worker in zip((1, 0, 2), workers, strict=True):
            code, text = worker.end()
            assert (code, text.splitlines()[-1]) == (0, f"process {number} of 3: 6"), text


def test_a_missing_process(start):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:
        other = start(port, 2, "once", count=4)
        server.accept()[0].close()  # It is up, and calls again.
    lead = start(port, 0, "once", count=4, wait=6)
    message = (
        f"waited 6 s at 127.0.0.1:{port}: 2 of 4 processes came: 0 ({HERE}), 2 ({HERE}); "
        "missing: 1, 3; see the logs of the missing, and whether they can reach that address\n"
    )
    assert lead.end() == (76, message)
    assert other.end() == (76, message)


def test_an_id_twice(start):
    port = free_port()
    workers = [start(port, number, "once", count=3) for number in (0, 1, 1)]
    message = (
        f"two processes say that they are process 1: on {HERE} and {HERE}; "
        "give each a process id of its own\n"
    )
    assert [worker.end() for worker in workers] == [(2, message)] * 3


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_one_that_died_while_it_waited_and_was_started_again(start, order):
    """Whether or not the others had come by then."""
    port = free_port()
    lead = start(port, 0, "once", count=3)
    call_and_die(port, 1, count=3)
    workers = {}
    for number in order:
        workers[number] = start(port, number, "once", count=3)
        time.sleep(3)  # The first has called before the second does.
    for number, worker in ({0: lead} | workers).items():
        code, text = worker.end()
        assert (code, text.splitlines()[-1]) == (0, f"process {number} of 3: 6"), text


def test_one_that_died_while_it_waited_is_missing(start):
    port = free_port()
    lead = start(port, 0, "once", count=3, wait=4)
    call_and_die(port, 1, count=3)
    message = (
        f"waited 4 s at 127.0.0.1:{port}: 1 of 3 processes came: 0 ({HERE}); missing: 1, 2; "
        "see the logs of the missing, and whether they can reach that address\n"
    )
    assert lead.end() == (76, message)


def test_jax_does_not_start(start):
    """What it says is told in a line, and the others end."""
    port = free_port()
    workers = [start(port, 0, "once"), start(port, 1, "unstarted")]
    (lead, heard), (own, said) = (worker.end() for worker in workers)
    assert said == (
        "JAX's distributed runtime did not start (DEADLINE_EXCEEDED: nobody came); "
        "start the processes again\n"
    )
    assert own == 76
    assert (lead, heard.splitlines()[-1]) == (
        76,
        f"error: process 1 ({HERE}) is gone; the state is that of the last checkpoint",
    )


def test_different_numbers(start):
    port = free_port()
    workers = [start(port, 0, "once", count=2), start(port, 1, "once", count=3)]
    message = (
        f"processes disagree on how many they are: process 1 on {HERE} says 3, "
        f"process 0 on {HERE} says 2; give all of them the same number\n"
    )
    assert [worker.end() for worker in workers] == [(2, message)] * 2


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        ("127.0.0.1", "connection refused: nothing listens there"),
        ("node.invalid", "the name does not resolve"),
    ],
)
def test_process_0_out_of_reach(start, host, problem):
    port = free_port()
    code, text = start(port, 1, "once", host=host, wait=2).end()
    start_of = f"process 1 on {HERE} cannot reach process 0 at {host}:{port}: {problem} (tried for "
    assert (code, text[: len(start_of)]) == (76, start_of)


def test_the_port_of_another(start):
    port = free_port()
    with stranger(port):
        workers = [start(port, number, "once", wait=2) for number in (0, 1)]
        (_, lead), (_, other) = (worker.end() for worker in workers)
    assert lead.startswith(f"process 0 on {HERE} cannot listen on port {port}: Address already in")
    assert f"127.0.0.1:{port}: something there does not answer as process 0 would" in other


def test_different_versions(start, tmp_path):
    """Told before JAX's own parts of different versions talk to each other."""
    described = tmp_path / "other" / "jaxlib-0.0.1.dist-info" / "METADATA"
    described.parent.mkdir(parents=True)
    described.write_text("Metadata-Version: 2.1\nName: jaxlib\nVersion: 0.0.1\n")
    port = free_port()
    workers = [start(port, 0, "once"), start(port, 1, "once", path=tmp_path / "other")]
    for worker in workers:
        code, text = worker.end()
        assert code == 2
        assert text.startswith("hosts disagree on jaxlib: ")
        assert text.endswith(
            f" on process 0 ({HERE}); 0.0.1 on process 1 ({HERE}); "
            "start all hosts with the same software, config and kind of machine\n"
        )


def test_different_facts(start):
    port = free_port()
    workers = [start(port, 0, "once", fact="a"), start(port, 1, "once", fact="b")]
    for worker in workers:
        code, text = worker.end()
        assert code == 2
        assert f"hosts disagree on fact: a on process 0 ({HERE}); b on process 1 ({HERE})" in text


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(start, victim):
    port = free_port()
    workers = [start(port, number, "loop", count=3) for number in range(3)]
    for worker in workers:
        worker.wait_for("of 3: 6")
    workers[victim].process.kill()
    for number in {0, 1, 2} - {victim}:
        code, text = workers[number].end()
        last = f"error: process {victim} ({HERE}) is gone; the state is that of the last checkpoint"
        assert (code, last in text) == (76, True), text


@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_done_still_notices_that_another_is_killed(start, victim):
    """Also process 0, which may be at work for others that are done: JAX would abort it."""
    port = free_port()
    workers = [start(port, number, "late") for number in range(2)]
    for worker in workers:
        worker.wait_for("of 2: 3")
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for the other
        workers[1].process.wait(1)
    workers[victim].process.kill()
    assert workers[1 - victim].end()[0] == 76


def test_a_busy_process_still_tells_that_process_0_is_gone(start):
    """JAX, which needs no turn in Python, would abort it without a word."""
    port = free_port()
    workers = [start(port, 0, "loop"), start(port, 1, "busy")]
    for worker in workers:
        worker.wait_for("of 2: 3")
    workers[0].process.kill()
    code, text = workers[1].end()
    assert code == 76, text
    gone = f"error: process 0 ({HERE}) is gone; "
    assert gone in text


def test_a_process_that_answers_nothing_ends_the_others(start):
    port = free_port()
    workers = [start(port, number, "loop", silent=10) for number in range(2)]
    for worker in workers:
        worker.wait_for("of 2: 3")
    workers[1].process.send_signal(signal.SIGSTOP)
    code, text = workers[0].end()
    assert code == -signal.SIGABRT
    assert "The following tasks are unhealthy (stopped sending heartbeats):\n1\n" in text


def test_a_mistake_found_by_one_process_ends_all_alike(start):
    port = free_port()
    workers = [start(port, number, "fault") for number in range(2)]
    (lead, heard), (own, said) = (worker.end() for worker in workers)
    assert (lead, own) == (2, 2)
    assert heard.splitlines()[-1] == f"error: process 1 ({HERE}): data.folder: no such folder"
    assert said.splitlines()[-1] == "data.folder: no such folder"


def test_errors_of_collectives():
    gloo = "UNKNOWN: Gloo all-reduce failed: [tcp/pair.cc:538] Read error [::1]:1: Connection reset"
    assert "a peer cannot be reached" in (describe_lost_peer(ValueError(gloo)) or "")
    assert describe_lost_peer(ValueError("shapes (2,) and (3,) do not match")) is None
    assert describe_lost_peer(OSError("Connection reset by peer")) is None
