"""Engines that run the tasks of a stage: processes of this machine, or a Ray cluster.

A task is a picklable function of a picklable argument. Tasks pass data on by files on a
disk that all machines share; a file appears when complete and has the same bytes
whoever writes it. So both engines leave the same files, and so does a task that is run
again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from maxlm.config import MaxlmError
from maxlm.runtime.pool import WorkerPool

Job = TypeVar("Job")
Result = TypeVar("Result")


class TaskExecutor(Protocol):
    """Runs tasks, in no order that its caller may rely on."""

    def map_unordered(
        self, function: Callable[[Job], Result], jobs: Sequence[Job]
    ) -> Iterator[Result]:
        """Yields `function(job)` for each job, in order of completion. A worker
        unpickles the function once, so what a callable object keeps in itself (an open
        model) is there for all the jobs that this worker does, and gone with the next
        function."""
        ...

    def require_on_workers(self, shared_folder: Path, packages: Sequence[str]) -> None:
        """Makes each worker check before its next task that it sees what is written to
        a folder, which exists, and has the same versions of packages (names of
        distributions)."""
        ...


def open_executor(on: str, workers: int | None) -> AbstractContextManager[TaskExecutor]:
    """Opens an engine, as a context manager.

    Args:
        on: "local": processes of this machine; "ray" or "ray://HOST:PORT": a Ray
            cluster, see `RayExecutor`.
        workers: tasks at a time, at most; None: one a core of this machine, or a CPU of
            the cluster.

    Raises:
        MaxlmError: `on` is none of these; when entered: no cluster answers, or Ray is
            not installed.
    """
    if on == "local":
        return WorkerPool(workers)
    if on != "ray" and not on.startswith("ray://"):
        fix = "choose: local, ray, ray://HOST:PORT"
        raise MaxlmError(f"{on!r} is no place to run tasks", where="--on", fix=fix)
    from maxlm.runtime.ray_executor import RayExecutor

    address = None if on == "ray" else on
    return RayExecutor(address, workers)
