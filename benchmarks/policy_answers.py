"""What a policy answers to prompts that it was not trained on, and what that scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maxlm.inference.engine import Engine
from maxlm.rl.advantages import sum_scores
from maxlm.rl.rewards.runner import RewardRunner
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.rollouts.sampler import RolloutSampler
from maxlm.rl.samples import Prompt, Sample
from maxlm.rl.tasks.policy import PolicyTask
from maxlm.run.config import RunConfig
from maxlm.run.load import load_model

SEED = 1_000_000_007
"""Of prompts and answers: far from any recipe's, since entry i of reasoning-gym follows
from seed + i."""


def get_policy_task(config: RunConfig) -> PolicyTask:
    """Returns the task of a run of ``maxlm rl``. Raises SystemExit: it is another."""
    task = config.task
    if not isinstance(task, PolicyTask):
        raise SystemExit(f"task.kind={task.kind} learns of no rollouts")
    return task


class AnsweringPolicy:
    """The model of a run or a Hugging Face folder, which answers the prompts of a
    recipe with the engine that training would have."""

    def __init__(self, folder: str | Path, config: RunConfig):
        self.config = config
        self.task = get_policy_task(config)
        loaded = load_model(folder)
        self.tokenizer = loaded.tokenizer
        max_length = self.task.make_layout(config.data.seq_len).max_entries + 1
        engine_config = self.task.engine.model_copy(update={"max_length": max_length})
        self.engine = Engine(
            loaded.model, loaded.params, engine_config, loaded.tokenizer
        )

    def draw_prompts(self, count: int) -> list[Prompt]:
        """Draws prompts, all different, that the run does not train on."""
        task = self.task
        batch_size = self.config.data.batch_size
        num_samples = batch_size * task.minibatches * task.sequences_per_row
        num_rollouts = self.config.train.steps // task.updates_per_rollout
        num_trained = num_rollouts * num_samples // task.num_samples
        order = self._open_order(self.config.seed)
        trained = {prompt.tokens for prompt in order.take(0, num_trained)}
        prompts: dict[tuple[int, ...], Prompt] = {}
        for prompt in self._open_order(SEED).take(0, 4 * count):
            if prompt.tokens not in trained:
                prompts.setdefault(prompt.tokens, prompt)
        if len(prompts) < count:
            raise SystemExit(
                f"{len(prompts)} of the prompts drawn are new, not {count}"
            )
        return list(prompts.values())[:count]

    def _open_order(self, seed: int) -> PromptOrder:
        max_entries = self.task.make_layout(self.config.data.seq_len).max_entries
        return PromptOrder(
            self.task.environment,
            self.tokenizer,
            seed=seed,
            max_prompt_length=max_entries + 1 - self.task.max_new_tokens,
            long_prompts=self.task.rollouts.long_prompts,
            shuffle=self.config.data.shuffle,
        )

    def answer(self, prompts: Sequence[Prompt], temperature: float) -> list[Sample]:
        """Draws an answer to each prompt, in their order."""
        rollouts = self.task.rollouts
        sampling = rollouts.sampling.model_copy(update={"temperature": temperature})
        sampler = RolloutSampler(
            self.engine,
            self.tokenizer,
            self.task.environment,
            rollouts.model_copy(update={"sampling": sampling}),
            seed=SEED,
        )
        places = {prompt.number: place for place, prompt in enumerate(prompts)}
        samples = sampler.sample(prompts, 1)
        return sorted(samples, key=lambda sample: places[sample.prompt.number])

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Returns the recipe's rewards of answers, float64 [answers]."""
        with RewardRunner(self.task.rewards) as runner:
            scores = runner.score(samples)
        return sum_scores(scores, [reward.weight for reward in self.task.rewards])
