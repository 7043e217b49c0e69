"""Where jobs run: in processes of this machine, or on a Ray cluster.

Jobs are picklable functions of picklable arguments that pass data on by files, on a disk that all
machines share; so both engines give the same files.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Literal, Protocol, TypeVar

from maxlm.config import MaxlmError
from maxlm.runtime.pool import WorkerPool, count_workers

Job = TypeVar("Job")
Result = TypeVar("Result")

ExecutorName = Literal["local", "ray"]


class Executor(Protocol):
    """Runs functions over jobs."""

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield `function(job)` for each job, in order of completion."""
        ...


def open_executor(name: ExecutorName, workers: int | None) -> AbstractContextManager[Executor]:
    """The engine `name`, as a context, of at most so many processes; None: as many as there are
    cores (local) or as the cluster has CPUs (ray)."""
    if name == "local":
        return WorkerPool(workers or count_workers())
    return RayExecutor(workers)


class RayExecutor:
    """Runs jobs as Ray tasks, on the cluster that this process is connected to or finds.

    `ray.init()` follows RAY_ADDRESS; without one and without a running cluster it starts one on
    this machine.
    """

    def __init__(self, workers: int | None = None):
        self._workers = workers
        self._started = False

    def __enter__(self) -> "RayExecutor":
        try:
            import ray
        except ImportError as error:
            what = "engine: ray needs Ray, which is not installed"
            raise MaxlmError(what, fix="pip install 'maxlm[ray]', or set engine: local") from error
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                fix = "check RAY_ADDRESS, or set engine: local"
                reason = str(error).splitlines()[0]
                raise MaxlmError(f"no Ray cluster to be reached: {reason}", fix=fix) from error
            self._started = True
        return self

    def __exit__(self, kind, value, trace) -> None:
        import ray

        if self._started:
            ray.shutdown()

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield `function(job)` for each job, in order of completion.

        Ray runs a task again whose worker or node died, which does no harm: jobs write files that
        appear when complete.
        """
        import ray
        from ray import exceptions

        task, here = ray.remote(_call_in), os.getcwd()
        most = self._workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting, busy = iter(jobs), []
        try:
            while True:
                free = (2 * most if self._workers is None else most) - len(busy)
                busy += [task.remote(here, function, job) for job in islice(waiting, free)]
                if not busy:
                    return
                done, busy = ray.wait(busy)
                yield ray.get(done[0])
        except exceptions.RayTaskError as error:
            raise error.cause from None
        except exceptions.RayError as error:
            fix = "look at the cluster's memory, or run it again with fewer workers"
            raise MaxlmError(f"a Ray worker died: {str(error).splitlines()[0]}", fix=fix) from error
        finally:
            for each in busy:
                ray.cancel(each, force=True)


def _call_in(folder: str, function: Callable[[Job], Result], job: Job) -> Result:
    """Call where relative paths mean what they meant for whoever wrote the job."""
    try:
        os.chdir(folder)
    except OSError as error:
        what = f"a Ray worker cannot see this folder ({error.strerror})"
        raise MaxlmError(what, where=folder, fix="run it on a disk that all nodes share") from error
    return function(job)
