"""A reward model's scores."""

from collections.abc import Sequence
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.config.base import LocalPath
from maxlm.rl.rewards.reward import BatchScorer, Reward, Worker
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.sharding import MeshConfig
from maxlm.tasks.extra_work import ScoringModel


class RewardModelReward(Reward):
    """The score of a run of task.kind=reward, for the prompt and all turns behind it, as
    its own tokenizer reads their text. It needs the column ``prompt``."""

    kind: str = "reward_model"
    run: LocalPath
    """Folder of the run."""
    mesh: MeshConfig | None = None
    """Devices that the model is spread over, of the process that scores; null: one."""

    @property
    def worker(self) -> Worker:
        return "batch"

    @property
    def scoring_model(self) -> ScoringModel:
        return ScoringModel(self.run, self.mesh)

    def check_setup(self) -> None:
        if not Path(self.run, "config.yaml").exists():
            message = "no run here (no config.yaml)"
            fix = "name the folder of a run of task.kind=reward"
            raise MaxlmError(message, where=self.run, fix=fix)

    def check_row(self, row: JsonMapping) -> None:
        if row.get("prompt") is None:
            message = "no column 'prompt', which the reward model reads"
            raise MaxlmError(message, fix="add it to the prompts")

    def open_batch(self) -> BatchScorer:
        # The rest of the rewards does without a model.
        from maxlm.run.reward_model import RewardModel

        model = RewardModel(self.run, mesh=self.mesh)

        def score(samples: Sequence[Sample]) -> Sequence[object]:
            results: list[object] = [None] * len(samples)
            tokens = {}
            for place, sample in enumerate(samples):
                try:
                    tokens[place] = model.encode_row(make_preference_row(sample))
                except MaxlmError as error:
                    results[place] = error  # of this sample alone
            scores = model.score_tokens(list(tokens.values()))
            for place, value in zip(tokens, scores, strict=True):
                results[place] = value
            return results

        return score

    def score(self, sample: Sample) -> object:
        return self.open_batch()([sample])[0]


def make_preference_row(sample: Sample) -> JsonObject:
    """Returns a sample as rows of tuning data are: a prompt with its completion, or
    messages."""
    row = sample.prompt.row
    prompt = row["prompt"]
    # The others are for the chat template, such as tools.
    replaced = ("prompt", "completion", "messages")
    columns = {name: value for name, value in row.items() if name not in replaced}
    is_text = isinstance(prompt, str)
    if is_text and [role for role, _ in sample.turns] == ["assistant"]:
        return {**columns, "prompt": prompt, "completion": sample.completion}
    messages = [{"role": "user", "content": prompt}] if is_text else list(prompt)
    for role, text in sample.turns:
        messages.append({"role": role, "content": text})
    return {**columns, "messages": messages}
