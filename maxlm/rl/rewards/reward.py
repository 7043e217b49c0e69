"""The base of rewards: a config that scores one sample."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from numbers import Real
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from maxlm.config import Config, MaxlmError
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping
from maxlm.tasks.extra_work import ScoringModel

Scorer = Callable[[Sample], object]
"""Returns the score of one sample, which :func:`read_score` checks."""
BatchScorer = Callable[[Sequence[Sample]], Sequence[object]]
"""Returns a score for each sample, or the error of those that have none."""
Worker = Literal["caller", "process", "thread", "batch"]
"""Where a reward scores: at once, where samples are submitted, for what takes
microseconds on any text; in a process that is killed beyond its time limit, for code
that can hang or uses signals; in a thread, for what waits for others; or all samples
together when they are collected, for models on this process's devices."""


class NoScoreError(Exception):
    """A reward returned something else than one finite number."""


class Reward(Config):
    """What samples are scored by: one score for one sample.

    Subclasses override :meth:`score`, or :meth:`open` if they hold something open.
    """

    kind: str
    name: str = ""
    """Name in metrics and records; default: the kind."""
    weight: float = 1.0
    """Factor of its scores in the sum of all rewards."""
    time_limit: float = Field(default=10.0, gt=0)
    """Seconds that the score of one sample may take; a sample that takes longer delays
    no other."""
    on_timeout: float | None = 0.0
    """Score of a sample that takes longer; null: training ends."""
    on_error: float | None = None
    """Score of a sample whose reward fails or is no finite number; null: training
    ends."""

    @field_validator("name")
    @classmethod
    def _name_by_kind(cls, name: str, info: ValidationInfo) -> str:
        return name or str(info.data.get("kind", ""))

    @property
    def worker(self) -> Worker:
        return "process"

    @property
    def concurrency(self) -> int:
        """Samples that are scored at once in threads."""
        return 1

    @property
    def scoring_model(self) -> ScoringModel | None:
        """The model that it holds on devices; None: it holds none."""
        return None

    def check_setup(self) -> None:
        """Checks what is needed on this machine. Raises MaxlmError: a package or file
        is missing."""

    def check_row(self, row: JsonMapping) -> None:
        """Checks that a prompt's row has what the reward reads. Raises MaxlmError."""

    def open(self) -> Scorer:
        """Returns what scores samples; a worker calls it once, before its first."""
        return self.score

    @abstractmethod
    def score(self, sample: Sample) -> object:
        """Returns the score of a sample: one finite number."""
        raise NotImplementedError

    def open_batch(self) -> BatchScorer:
        """Returns what scores samples together, of rewards whose ``worker`` is
        ``batch``; called once, before the first."""
        raise NotImplementedError


def read_score(score: object) -> float:
    """Returns a score as a float. Raises NoScoreError: it is no finite number."""
    # NumPy's and JAX's scalars, which are no Real.
    if getattr(score, "shape", None) == () and hasattr(score, "item"):
        scalar: Any = score
        score = scalar.item()
    if score is None:
        raise NoScoreError("returned None")
    if not isinstance(score, Real):
        if isinstance(score, Sequence) and not isinstance(score, str | bytes):
            raise NoScoreError(f"returned {len(score)} values for one sample")
        if getattr(score, "shape", ()):
            shape = list(getattr(score, "shape", ()))
            raise NoScoreError(f"returned an array {shape} for one sample")
        kind = type(score).__name__
        raise NoScoreError(f"returned {describe_text(repr(score))}, a {kind}")
    number = float(score)
    if not math.isfinite(number):
        raise NoScoreError(f"returned {number}")
    return number


def describe_text(text: str, max_length: int = 80) -> str:
    """Returns the beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= max_length else f"{line[:max_length]}..."


def require_column(row: JsonMapping, column: str, setting: str) -> object:
    """Returns a column's value. Raises MaxlmError: a row has none."""
    value = row.get(column)
    if value is None:
        message = f"no column {column!r}, which {setting} names"
        columns = ", ".join(row) or "none"
        fix = f"add it to the prompts, or name another of its columns: {columns}"
        raise MaxlmError(message, fix=fix)
    return value


def require_package(
    module: str, package: str, kind: str, installation: str = "pip install 'maxlm[rl]'"
) -> None:
    """Raises MaxlmError: a package is not installed."""
    if find_spec(module) is None:
        message = f"a reward of kind={kind} needs the package {package}"
        raise MaxlmError(message, fix=installation)
