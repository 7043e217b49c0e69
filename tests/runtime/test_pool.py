"""The pool of worker processes."""

import math
import operator
import os
import signal
import subprocess
import sys

import psutil
import pytest

from maxlm.config import MaxlmError
from maxlm.runtime.pool import WorkerPool

pytestmark = pytest.mark.heavy


def test_results_errors_and_several_maps():
    with WorkerPool(2) as pool:
        assert sorted(pool.map_unordered(math.factorial, [3, 4, 5, 6, 7])) == [
            6,
            24,
            120,
            720,
            5040,
        ]
        with pytest.raises(
            ValueError, match=r"math domain error|nonnegative"
        ) as caught:
            list(pool.map_unordered(math.sqrt, [1.0, -1.0]))
        assert "in run_pickled" in str(caught.value.__cause__)  # where, in the worker
        # Answers of the failed map that were still on their way are not taken for
        # these.
        assert sorted(pool.map_unordered(abs, [-8, -9, -10])) == [8, 9, 10]
        with pytest.raises(TypeError, match="cannot pickle"):
            list(pool.map_unordered(open, [os.devnull] * 2))
        assert sorted(pool.map_unordered(abs, [-1, -2])) == [1, 2]


def test_workers_have_single_threaded_tokenizers_and_other_pids():
    before = dict(os.environ)
    with WorkerPool(2) as pool:
        assert list(pool.map_unordered(operator.call, [os.getpid])) == [
            os.getpid()
        ]  # one job needs none
        env = list(pool.map_unordered(os.getenv, ["TOKENIZERS_PARALLELISM"] * 2))
        pids = set(pool.map_unordered(operator.call, [os.getpid] * 8))
        assert (
            set(pool.map_unordered(operator.call, [os.getpid])) <= pids
        )  # who is there already
        assert list(pool.map_unordered(abs, [])) == []
    assert env == ["false", "false"]
    assert os.getpid() not in pids
    assert os.environ == before


class Counts:
    """Says how many jobs this copy of it has done, and where."""

    def __init__(self):
        self.done = 0

    def __call__(self, _):
        self.done += 1
        return os.getpid(), self.done


@pytest.mark.parametrize("workers", [1, 2])
def test_a_function_keeps_what_it_has_for_all_jobs_of_a_worker_in_one_map(workers):
    with WorkerPool(workers) as pool:
        for _ in range(2):
            results = list(pool.map_unordered(Counts(), range(9)))
            for pid in {pid for pid, _ in results}:
                here = [done for worker, done in results if worker == pid]
                assert sorted(here) == list(range(1, len(here) + 1))


def test_a_dead_worker_is_an_error():
    with pytest.raises(MaxlmError) as caught, WorkerPool(2) as pool:
        list(pool.map_unordered(os._exit, [1, 1]))
    assert str(caught.value) == (
        "a worker process died, most likely for want of memory; run it again with "
        "fewer workers; "
        "a script of your own must start under if __name__ == '__main__'"
    )


def test_notices_are_left_to_the_parent():
    script = (
        "import os, signal, sys\n"
        "from maxlm.runtime.pool import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):\n"
        "        signal.signal(number, lambda *_: print('told', flush=True))\n"
        "    with WorkerPool(2) as pool:\n"
        "        print(*pool.map_unordered(abs, [1, 2]), flush=True)\n"
        "        sys.stdin.readline()\n"
        "        print(*pool.map_unordered(abs, [3, 4]), flush=True)\n"
        "    with WorkerPool(2) as pool:\n"
        "        print(*pool.map_unordered(abs, [5, 6]), flush=True)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert sorted(parent.stdout.readline().split()) == ["1", "2"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(parent.pid, number)
        assert parent.stdout.readline() == "told\n"
    out, err = parent.communicate("go on\n", timeout=300)
    assert (sorted(out.split()), err, parent.returncode) == (
        ["3", "4", "5", "6"],
        "",
        0,
    )


def test_workers_end_when_their_parent_is_killed():
    script = (
        "import time\n"
        "from maxlm.runtime.pool import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    with WorkerPool(2) as pool:\n"
        "        list(pool.map_unordered(abs, [1, 2]))\n"
        "        print('ready', flush=True)\n"
        "        list(pool.map_unordered(time.sleep, [100, 100]))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=300)
    assert not alive
