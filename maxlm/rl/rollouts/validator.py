"""Tries a policy on prompts that it does not learn from, with the engine of its
rollouts."""

import jax

from maxlm.data.loader.permutation import derive_key
from maxlm.optim.state import TrainState
from maxlm.rl.rewards.runner import RewardRunner
from maxlm.rl.rollouts.generation import PolicyEngine
from maxlm.rl.rollouts.prompts import PromptOrder
from maxlm.rl.rollouts.records import VALIDATION_FILE, SampleLog
from maxlm.rl.rollouts.replies import check_template_keeps_turns
from maxlm.rl.rollouts.scoring import collect_scores, list_scored
from maxlm.rl.rollouts.task import RolloutTask
from maxlm.rl.rollouts.validation import ValidationConfig, describe_validation
from maxlm.rl.samples import Sample
from maxlm.run.rollout_source import RolloutContext


class PolicyValidator:
    """Answers the validation prompts of a run with parameters of any step, and scores
    the answers.

    Random streams are the same at every step: what differs between two is what was
    learnt. Of those of training none is touched.

    Args:
        engine: of the run's rollouts.
        runner: what scores samples, on process 0; None on others.

    Raises:
        MaxlmError: prompts that cannot be read, are too long or lack what a reward
            reads.
    """

    def __init__(
        self,
        task: RolloutTask,
        validation: ValidationConfig,
        context: RolloutContext,
        engine: PolicyEngine,
        runner: RewardRunner | None,
    ):
        self._task = task
        self._validation = validation
        self._context = context
        self._engine = engine
        self._runner = runner
        config = context.setup.config
        environment = validation.environment
        if environment.max_turns > 1 and environment.chat:
            check_template_keeps_turns(environment, context.tokenizer)
        order = PromptOrder(
            environment,
            context.tokenizer,
            # An environment that draws its prompts draws others than for training.
            seed=derive_key(config.seed, "validation") % 2**31,
            max_prompt_length=engine.max_prompt_length,
            long_prompts=task.rollouts.long_prompts,
            shuffle=False,
            workers=config.data.build_workers,
        )
        if order.num_left_out:
            context.say(
                f"{order.num_left_out:,} validation prompts are left out: longer than "
                f"{engine.max_prompt_length:,} tokens"
            )
        num_prompts = validation.num_prompts
        if order.prompts_per_epoch is not None:
            num_prompts = min(num_prompts, order.prompts_per_epoch)
        self._prompts = order.take(0, num_prompts)
        if runner is not None:
            runner.check(self._prompts)
        self._log = SampleLog(
            context.folder, VALIDATION_FILE, write=jax.process_index() == 0
        )

    def validate(self, state: TrainState) -> dict[str, float]:
        """Returns what is logged of a state, and appends its answers to
        ``samples/validation.jsonl``. Called on all processes together.

        Raises:
            MaxlmError: a reward or the environment failed.
        """
        step = int(state.step)
        samples = self._draw(state, step)
        scores = collect_scores(self._runner, samples)
        # The step needs the memory of the engine's caches.
        self._engine.release()
        rewards = self._task.rewards
        scored = list_scored(samples, scores, rewards, self._context.tokenizer)
        self._log.append(step, step, scored)
        num_samples = self._validation.num_samples
        return describe_validation(rewards, samples, scores, num_samples)

    def _draw(self, state: TrainState, step: int) -> list[Sample]:
        """Returns the samples of each prompt side by side; scoring them has begun."""
        rollouts = self._task.rollouts
        temperature = self._validation.temperature
        sampling = rollouts.sampling.model_copy(update={"temperature": temperature})
        sampler = self._engine.open_other_sampler(
            state.params,
            step,
            self._validation.environment,
            rollouts.model_copy(update={"sampling": sampling}),
            "validation",
        )
        num_samples = self._validation.num_samples
        sampler.add(self._prompts, num_samples)
        samples_by_place: dict[int, Sample] = {}
        while len(samples_by_place) < len(self._prompts) * num_samples:
            for sample in sampler.advance(1):
                place = sample.prompt.number * num_samples + sample.number
                samples_by_place[place] = sample
                if self._runner is not None:
                    self._runner.submit(sample)
            # With each dispatch: an answer may take longer than a step may.
            self._context.on_work()
        return [samples_by_place[place] for place in sorted(samples_by_place)]
