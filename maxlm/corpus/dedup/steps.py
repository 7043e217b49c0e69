"""Running a stage's steps one after another."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from maxlm.runtime.executor import Executor
from maxlm.runtime.progress import Progress

Job = TypeVar("Job")
Result = TypeVar("Result")


class StepRunner:
    """Runs steps, each a function over jobs, and shows their progress."""

    def __init__(self, title: str, engine: Executor, progress: Progress):
        self._title, self._engine, self._progress = title, engine, progress

    def run(
        self, name: str, function: Callable[[Job], Result], jobs: Sequence[Job]
    ) -> list[Result]:
        """Runs a function over jobs; returns its results in order of completion."""
        title, results = f"{self._title}: {name}", []
        self._progress(title, 0, len(jobs))
        for result in self._engine.map(function, jobs):
            results.append(result)
            self._progress(title, len(results), len(jobs))
        return results
