"""A corpus is the same when its tasks run on a Ray cluster, also if a node is lost on
the way."""

import json
import math
import os
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from maxlm.cli.main import main
from maxlm.config import MaxlmError
from maxlm.corpus.run import run_recipe
from maxlm.runtime.executor import open_executor
from tests.corpus.corpora import recipe
from tests.corpus.ray_nodes import (
    CountedTasks,
    find_free_port,
    kill_node,
    start_head,
    start_node,
    wait_until_joined,
)

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def head():
    # pytest's own folders have names too long for sockets.
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as folder,
        start_head(Path(folder)) as head,
    ):
        yield head


@pytest.fixture(scope="module")
def executor(head):
    with ExitStack() as stack:
        yield connect(head.client_address, stack, attempts=3)


def connect(address, stack, attempts):
    """Ray's client waits half a minute, which is too short on a busy machine."""
    try:
        return stack.enter_context(open_executor(address, None))
    except MaxlmError as error:
        if "timeout" not in str(error) or attempts == 1:
            raise
        return connect(address, stack, attempts - 1)


def read_files(folder):
    """Every file of a corpus: JSON without what tells when and where it was made."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            passing = ("last_run", "sha256", "out", "workers")
            files[name] = {
                key: value for key, value in content.items() if key not in passing
            }
        elif path.is_file() and not name.startswith(".ray-"):
            files[name] = path.read_bytes()
    return files


# Before the tests that are connected to a cluster, which `ray` would mean.
@pytest.mark.parametrize(
    ("on", "message"),
    [
        (
            "dask",
            "--on: 'dask' is no place to run tasks; choose: local, ray, "
            "ray://HOST:PORT",
        ),
        (
            "ray://127.0.0.1:{port}",
            "no Ray cluster answers at ray://127.0.0.1:{port} (Connection",
        ),
        (
            "ray",
            "no Ray cluster answers at 127.0.0.1:{port} (Connection refused); start "
            "one with",
        ),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(
    crawl, tmp_path, capsys, monkeypatch, on, message
):
    port = find_free_port()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(crawl, tmp_path / "corpus").model_dump_json())
    assert main(["corpus", "run", str(path), "--on", on.format(port=port)]) == 2
    error = capsys.readouterr().err
    assert message.format(port=port) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "corpus").exists()


def test_ray_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(MaxlmError, match=r"pip install 'maxlm\[ray\]'"):
        open_executor("ray://127.0.0.1:1", None).__enter__()


def test_a_node_that_is_killed_in_the_middle_changes_no_byte(
    head, executor, whole, crawl, tmp_path
):
    corpus_is_written = threading.Event()

    def kill_when_stuck(node):
        # A node that gets no such task never sticks: the test ends nevertheless.
        while not (tmp_path / "stuck").exists() and not corpus_is_written.is_set():
            time.sleep(0.02)
        kill_node(node)

    out = tmp_path / "corpus"
    log = tmp_path / "node.log"
    address = f"--address=127.0.0.1:{head.port}"
    with start_node(log, address, DOOMED="1") as node:
        # Else the other node may have done all tasks before this one has joined.
        wait_until_joined(node, log)
        killer = threading.Thread(target=kill_when_stuck, args=[node])
        killer.start()
        tasks = CountedTasks(executor, tmp_path, "_write_candidates")
        try:
            run_recipe(recipe(crawl, out, workers=None), executor=tasks)
        finally:
            corpus_is_written.set()
            killer.join()
    print(
        f"{tasks.num_jobs} tasks, {tasks.num_begun - tasks.num_jobs} of them begun "
        f"again"
    )
    assert (tmp_path / "stuck").exists(), "the node has not begun such a task"
    assert tasks.num_begun > tasks.num_jobs
    assert read_files(out) == read_files(whole)


def test_results_come_from_other_processes_and_one_function_is_unpickled_once(executor):
    assert list(executor.map_unordered(math.factorial, [])) == []
    results = list(executor.map_unordered(Counter(), [3, 4, 5, 6]))
    assert sorted(value for value, _, _ in results) == [9, 16, 25, 36]
    pids = {pid for _, pid, _ in results}
    assert os.getpid() not in pids
    for pid in pids:
        numbers = [number for _, other, number in results if other == pid]
        assert sorted(numbers) == list(range(1, len(numbers) + 1))


class Counter:
    """Squares, and counts how often this copy of it has."""

    def __init__(self):
        self.number = 0

    def __call__(self, value):
        self.number += 1
        return value * value, os.getpid(), self.number


def refuse(job):
    raise MaxlmError(f"no {job}", where="here", fix="give less")


def test_errors_arrive_as_they_are(executor):
    with pytest.raises(MaxlmError) as refused:
        list(executor.map_unordered(refuse, ["way"]))
    assert str(refused.value) == "here: no way; give less"
    with pytest.raises(ValueError, match="math domain error") as bug:
        list(executor.map_unordered(math.sqrt, [-1.0]))
    assert "in run_pickled" in str(bug.value.__cause__)  # where, in the worker


def test_a_task_whose_process_dies_again_and_again_is_one_line(executor):
    with pytest.raises(
        MaxlmError, match=r"gave up on a task \(.*died.*goes on where it stopped"
    ):
        list(executor.map_unordered(os._exit, [1]))


def test_workers_that_lack_what_a_task_needs_say_what_to_do(
    executor, tmp_path, monkeypatch
):
    (tmp_path / "corpus").mkdir()
    descriptor = os.open(tmp_path / "corpus", os.O_RDONLY)
    # A folder of this process, and something else or nothing under the same path in
    # another.
    executor.require_on_workers(Path(f"/proc/self/fd/{descriptor}"), [])
    with pytest.raises(
        MaxlmError, match=r"does not see what is written .* put it on a disk"
    ):
        list(executor.map_unordered(abs, [1]))
    os.close(descriptor)

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    executor.require_on_workers(tmp_path, [])
    (tmp_path / "here").rmdir()
    with pytest.raises(
        MaxlmError, match=r"does not see this folder .* that all machines"
    ):
        list(executor.map_unordered(abs, [1]))
    monkeypatch.undo()

    monkeypatch.setattr("maxlm.runtime.ray_executor.version", lambda _: "0.0.7")
    executor.require_on_workers(tmp_path, ["numpy"])
    with pytest.raises(
        MaxlmError, match=r"and this machine 0\.0\.7; pip install 'maxlm==0\.0\.7'"
    ):
        list(executor.map_unordered(abs, [1]))
    monkeypatch.undo()
    executor.require_on_workers(tmp_path, ["numpy"])
    assert list(executor.map_unordered(abs, [-1])) == [1]
