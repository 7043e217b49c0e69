"""Scores of reasoning-gym's tasks (Stojanovski et al. 2505.24760)."""

from maxlm.config import MaxlmError
from maxlm.rl.reasoning_gym_package import INSTALLATION, import_reasoning_gym
from maxlm.rl.rewards.answers import AnswerReward
from maxlm.rl.rewards.reward import (
    Scorer,
    Worker,
    describe_text,
    require_column,
    require_package,
)
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping


class ReasoningGymReward(AnswerReward):
    """What the task that made the row says of the answer: 0 to 1. The row has the
    columns ``question``, ``answer`` and ``metadata`` of reasoning-gym, and ``dataset``,
    the task's name."""

    kind: str = "reasoning_gym"
    task: str | None = None
    """Name of the task, for all rows; null: the row's, in its column ``dataset`` or
    ``metadata.source_dataset``."""
    partial_credit: bool = False
    """Whether scores between 0 and 1 count. Many tasks give one to an answer that
    contains the right one among other words, which a policy learns to exploit; false:
    they are 0."""

    @property
    def worker(self) -> Worker:
        return "process"

    def check_setup(self) -> None:
        require_package("reasoning_gym", "reasoning-gym", self.kind, INSTALLATION)

    def check_row(self, row: JsonMapping) -> None:
        require_column(row, "answer", "reasoning-gym's scorer")
        self._find_task(row)

    def open(self) -> Scorer:
        import_reasoning_gym()
        return self.score

    def score(self, sample: Sample) -> float:
        factory = import_reasoning_gym()
        row = sample.prompt.row
        task = self._find_task(row)
        if task not in factory.DATASETS:
            message = f"reasoning-gym has no task {describe_text(task)!r}"
            raise MaxlmError(message, fix="correct task, or the row's dataset")
        answer = self.read_answer(sample)
        entry = {
            "question": row.get("question", row.get("prompt")),
            "answer": row["answer"],
            "metadata": row.get("metadata", {}),
        }
        score = factory.get_score_answer_fn(task)(answer, entry)
        if not self.partial_credit and isinstance(score, int | float):
            return float(score >= 1)
        return score

    def _find_task(self, row: JsonMapping) -> str:
        if self.task is not None:
            return self.task
        metadata = row.get("metadata")
        source = metadata.get("source_dataset") if isinstance(metadata, dict) else None
        task = row.get("dataset", source)
        if not isinstance(task, str):
            message = "no column 'dataset' that names reasoning-gym's task"
            raise MaxlmError(message, fix="add it, or set task")
        return task
