"""Batches made ahead in threads and processes: the same batches, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from maxlm.data.loader import LoaderConfig, make_batches, make_loader
from maxlm.data.loader.prefetch import SHORT_RUN_STEPS

REPOSITORY = Path(__file__).parents[3]


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def children(pid):
    """Any thread may have started a worker, and each lists its own children."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for path in lists for child in read_proc(path).split()}


def read_proc(path):
    """What stands in a file of /proc; nothing, if its thread or process has just ended."""
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid):
    stat = read_proc(f"/proc/{pid}/stat")
    return bool(stat) and stat.rpartition(")")[2].split()[0] != "Z"


def shared_memory(pid):
    """The segments of shared memory that the process has mapped."""
    return set(re.findall(r"/dev/shm/psm_\w+", Path(f"/proc/{pid}/maps").read_text()))


def test_workers_make_the_same_batches(memory_store):
    stores = {"a": memory_store([5, 30, 9, 200]), "b": memory_store([70])}
    weights = {"a": 1, "b": 2}
    config = LoaderConfig(seq_len=16, batch_size=4, packing="best_fit", workers=2, prefetch=2)
    batches = make_batches(stores, weights, config, seed=1)
    steps = SHORT_RUN_STEPS + 5
    loader = make_loader(stores, weights, config, seed=1, start_step=37, num_steps=steps)
    made = list(loader)
    assert len(made) == steps
    for step, batch in enumerate(made, start=37):
        expected = batches.rows(step)
        for name in expected:
            assert type(batch[name]) is np.ndarray
            assert np.array_equal(batch[name], expected[name])
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    assert not shared_memory(os.getpid())


def test_an_early_close_ends_the_workers(memory_store):
    before = children(os.getpid())
    config = LoaderConfig(seq_len=16, batch_size=4, workers=1)
    loader = make_loader({"a": memory_store([99])}, {"a": 1}, config, seed=1, start_step=0)
    next(loader)
    wait_until(lambda: len(worker_pids(os.getpid()) - before) == 1)
    loader.close()
    loader.close()
    wait_until(lambda: not worker_pids(os.getpid()) - before)


def worker_pids(pid):
    """Child processes that live, less Python's own resource tracker."""
    lines = {child: read_proc(f"/proc/{child}/cmdline") for child in children(pid)}
    return {child for child, line in lines.items() if line and "resource_tracker" not in line}


def test_a_short_run_starts_no_workers(memory_store):
    before = worker_pids(os.getpid())
    config = LoaderConfig(seq_len=16, batch_size=4, workers=2)
    loader = make_loader(
        {"a": memory_store([99])}, {"a": 1}, config, seed=1, start_step=5, num_steps=SHORT_RUN_STEPS
    )
    assert len(list(loader)) == SHORT_RUN_STEPS
    assert worker_pids(os.getpid()) == before


def test_an_error_in_a_batch_reaches_the_caller(memory_store):
    store = memory_store([99])
    store.read_many = None
    config = LoaderConfig(seq_len=16, batch_size=4, workers=0)
    with (
        make_loader({"a": store}, {"a": 1}, config, seed=1, start_step=0) as loader,
        pytest.raises(TypeError, match="NoneType"),
    ):
        next(loader)


SCRIPT = """
    import signal, sys, time
    import numpy as np
    from maxlm.data.loader import LoaderConfig, make_loader

    class Store:
        path, num_tokens, offsets = None, 999, np.array([0, 999])
        def read_many(self, starts, stops):
            return [np.arange(a, b, dtype=np.uint16) for a, b in zip(starts, stops)]

    if __name__ == "__main__":
        # A shell's background job is born ignoring the first.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)
        config = LoaderConfig(seq_len=16, batch_size=4, workers=1)
        loader = make_loader({"a": Store()}, {"a": 1}, config, seed=1, start_step=0)
        for _ in range(int(sys.argv[1])):
            next(loader)
        try:
            print("going", flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            for _ in range(20):
                next(loader)
            print("went on", loader.step, flush=True)
"""


@pytest.fixture
def trainer(tmp_path):
    """A process that has taken 20 batches."""
    (tmp_path / "trainer.py").write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "trainer.py"), "20"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "going\n"
    yield process
    process.kill()
    process.communicate()


def test_kill_9_leaves_no_workers(trainer):
    # The worker and Python's resource tracker; a thread that ends hands its children to another.
    wait_until(lambda: len(children(trainer.pid)) == 2)
    pids = children(trainer.pid)
    trainer.kill()
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_notices_spare_the_workers_and_the_exit_is_clean(trainer, number):
    """A terminal sends Ctrl-C to all processes, a scheduler its notice; the trainer may still want
    batches."""
    wait_until(lambda: len(children(trainer.pid)) == 2)
    pids = children(trainer.pid)
    os.killpg(trainer.pid, number)
    out, errors = trainer.communicate(timeout=300)
    assert (errors, out, trainer.returncode) == ("", "went on 40\n", 0)
    wait_until(lambda: not any(map(alive, pids)))
