"""Tasks of reasoning-gym, which are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.rl.environments.environment import Environment, PromptRows
from maxlm.rl.reasoning_gym_package import import_reasoning_gym
from maxlm.runtime.json_types import JsonObject


@dataclass(frozen=True)
class ReasoningGymRows:
    """Rows of a task of reasoning-gym."""

    dataset: Any
    """A ``reasoning_gym.dataset.ProceduralDataset``."""
    task: str
    instruction: str

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row_number: int, /) -> JsonObject:
        entry = self.dataset[row_number]
        return {
            "prompt": entry["question"] + self.instruction,
            "question": entry["question"],
            "answer": entry["answer"],
            "dataset": self.task,
            "metadata": entry.get("metadata", {}),
        }

    def locate(self, row_number: int, /) -> str:
        return f"environment.task={self.task}: row {row_number}"


class ReasoningGymEnvironment(Environment):
    """Prompts of one task of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760):
    ``prompt`` is an entry's question with ``instruction`` behind it; ``question``,
    ``answer``, ``metadata`` and ``dataset`` (the task's name) are for its scorer."""

    kind: str = "reasoning_gym"
    task: str
    """Name of the task: ``basic_arithmetic``, ``leg_counting``, ..."""
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """The task's own settings: {min_terms: 2, max_terms: 3}."""
    num_rows: int = Field(default=10_000, gt=0)
    """Entries there are; an epoch reads each once."""
    instruction: str = ""
    """Text behind each question, such as how to write the answer."""

    def open_prompts(self, seed: int) -> PromptRows:
        dataset = create_reasoning_gym_dataset(
            self.task, seed=seed, size=self.num_rows, settings=self.settings
        )
        return ReasoningGymRows(dataset, self.task, self.instruction)


def create_reasoning_gym_dataset(
    task: str, *, seed: int, size: int, settings: Mapping[str, Any]
) -> Any:
    """Returns a task's ``reasoning_gym.dataset.ProceduralDataset`` of ``size`` entries.
    Raises MaxlmError: the package is missing, or knows no such task or settings."""
    factory = import_reasoning_gym()
    if task not in factory.DATASETS:
        near = get_close_matches(task, factory.DATASETS, n=1)
        fix = f"did you mean {near[0]}?" if near else "see reasoning-gym's gallery"
        message = f"reasoning-gym has no task {task!r}"
        raise MaxlmError(message, where="environment.task", fix=fix)
    try:
        return factory.create_dataset(task, **{**settings, "seed": seed, "size": size})
    # It checks its settings by assertions, and names that it does not know are
    # arguments of a dataclass.
    except (AssertionError, TypeError, ValueError) as error:
        message = f"reasoning-gym's {task} does not take these settings: {error}"
        fix = "see its page in reasoning-gym's gallery"
        raise MaxlmError(message, where="environment.settings", fix=fix) from error
