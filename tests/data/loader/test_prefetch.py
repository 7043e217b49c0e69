"""Batches made ahead in threads and processes: the same batches, and nothing left
behind."""

import collections
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.config.errors import ProcessLost
from maxlm.data.loader.batches import load_batches, make_batches
from maxlm.data.loader.prefetch import THREAD_STEPS, Prefetcher
from tests.data.loader.memory import (
    MemoryStore,
    assert_equal,
    config,
    fail_in_a_worker,
    name_maker,
    take_until_workers_make,
)

pytestmark = pytest.mark.heavy

REPOSITORY = Path(__file__).parents[3]


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def read_proc(path):
    """What stands in a file of /proc; nothing, if its thread or process has just
    ended."""
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def worker_pids(pid):
    """Child processes that live, less Python's own resource tracker."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    children = {int(child) for path in lists for child in read_proc(path).split()}
    lines = {child: read_proc(f"/proc/{child}/cmdline") for child in children}
    return {
        child
        for child, line in lines.items()
        if line and "resource_tracker" not in line
    }


def make_steps(workers, stop=None, make=None):
    return Prefetcher(make or name_maker, 5, stop, workers=workers, prefetch=2)


def test_the_first_batches_are_made_here_and_workers_take_over_in_order():
    with make_steps(workers=2) as loader:
        taken = take_until_workers_make(loader) + [next(loader) for _ in range(9)]
        assert taken[0]["pid"] == os.getpid()  # It did not wait for them.
        assert [int(batch["step"]) for batch in taken] == list(range(5, 5 + len(taken)))
        assert len({int(batch["pid"]) for batch in taken[-4:]} - {os.getpid()}) > 0
        assert loader.step == 5 + len(taken)
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    assert not worker_pids(os.getpid())


def test_workers_make_the_same_batches():
    stores = {"a": MemoryStore([5, 30, 9, 200]), "b": MemoryStore([70])}
    loader_config = config(seq_len=16, batch_size=4, packing="best_fit")
    batches = make_batches(stores, {"a": 1, "b": 2}, loader_config, seed=1)
    with load_batches(batches, [3, 1], start_step=37, workers=1) as loader:
        for step in range(37, 37 + THREAD_STEPS + 5):
            assert_equal(next(loader), batches.rows(step, [3, 1]))
    (tokens,) = {
        batch["tokens"].shape for batch in load_batches(batches, [0], num_steps=3)
    }
    assert tokens == (1, 16)


def test_a_short_run_starts_no_workers():
    with make_steps(workers=2, stop=5 + THREAD_STEPS) as loader:
        assert {int(batch["pid"]) for batch in loader} == {os.getpid()}
    assert loader.step == 5 + THREAD_STEPS


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_batch_reaches_the_caller(workers):
    def fail(step):
        raise MaxlmError(f"step {step} is damaged")

    make = fail_in_a_worker if workers else fail
    with make_steps(workers, make=make) as loader:
        for _ in range(2):
            with pytest.raises(MaxlmError, match=r"step \d+ is damaged"):
                take_until_workers_make(loader)


def test_a_killed_worker_is_named():
    with make_steps(workers=1) as loader:
        pid = int(take_until_workers_make(loader)[-1]["pid"])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(
            ProcessLost, match=r"worker was killed by signal 9 .*out of memory"
        ):
            collections.deque(loader, maxlen=0)


SCRIPT = """
    import signal, sys, time
    from maxlm.data.loader.prefetch import Prefetcher
    from tests.data.loader.memory import name_maker, take_until_workers_make

    if __name__ == "__main__":
        # A shell's background job is born ignoring the first.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)
        loader = Prefetcher(name_maker, 0, None, workers=1, prefetch=4)
        take_until_workers_make(loader)
        try:
            print("going", flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            last = [next(loader) for _ in range(20)][-1]
            print("went on", last["pid"], flush=True)
"""


@pytest.fixture
def trainer(tmp_path):
    """A process that has taken batches of its worker, and the worker's pid."""
    (tmp_path / "trainer.py").write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "trainer.py")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "going\n"
    (worker,) = worker_pids(process.pid)
    yield process, worker
    process.kill()
    process.communicate()


def alive(pid):
    stat = read_proc(f"/proc/{pid}/stat")
    return bool(stat) and stat.rpartition(")")[2].split()[0] != "Z"


def test_kill_9_leaves_no_workers(trainer):
    process, worker = trainer
    process.kill()
    wait_until(lambda: not alive(worker))


def test_notices_spare_the_workers_and_the_exit_is_clean(trainer):
    """A terminal sends Ctrl-C to all processes, a scheduler its notice; the trainer may
    still want batches."""
    process, worker = trainer
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker, number)
    os.kill(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=300)
    assert (errors, out, process.returncode) == ("", f"went on {worker}\n", 0)
    wait_until(lambda: not alive(worker))


SLOW_START = """
    import sys, time
    from pathlib import Path
    from maxlm.data.loader.prefetch import THREAD_STEPS, Prefetcher
    from tests.data.loader.memory import name_maker

    if __name__ != "__main__":  # In a worker, which imports this file before it can work.
        Path(sys.argv[1], str(time.monotonic_ns())).touch()
        time.sleep(3600)

    def make_large(step, _=bytes(int(sys.argv[2]))):
        return name_maker(step)

    if __name__ == "__main__":
        stopped = []
        options = {"prefetch": 2, "is_stop_requested": lambda: bool(stopped)}
        loader = Prefetcher(make_large, 0, None, workers=2, **options)
        for _ in range(THREAD_STEPS):
            next(loader)
        while len(list(Path(sys.argv[1]).iterdir())) < 2:
            time.sleep(0.05)
        if sys.argv[3] == "stop":
            stopped.append(True)
            print([int(next(loader)["step"]) - THREAD_STEPS for _ in range(3)], flush=True)
            loader.close()
        print("ends", flush=True)
"""


@pytest.mark.parametrize(
    ("action", "num_bytes"),
    [("stop", 1 << 20), pytest.param("exit", 0, marks=pytest.mark.more)],
)
def test_workers_that_still_start_are_not_waited_for(tmp_path, action, num_bytes):
    """Where a stop is asked for and the loader closed, and at the end of the process.
    What pickles to more than a pipe holds would keep its sender until the worker reads
    it."""
    (tmp_path / "trainer.py").write_text(textwrap.dedent(SLOW_START))
    (tmp_path / "started").mkdir()
    script = [sys.executable, "trainer.py", "started", str(num_bytes), action]
    process = subprocess.Popen(
        script,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len(worker_pids(process.pid)) == 2 or process.poll() is not None)
    workers = worker_pids(process.pid)
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        survivors = {pid for pid in workers if alive(pid)}
        for pid in survivors:
            os.kill(pid, signal.SIGKILL)
    expected_output = "[0, 1, 2]\n" if action == "stop" else ""
    assert (errors, out, process.returncode) == ("", f"{expected_output}ends\n", 0)
    assert survivors == set()
