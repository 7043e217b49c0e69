"""A policy tells the plan of a run what its rollouts cost: as many sequences as the
source draws, as long as the engine has room for, and each pass over a rollout that
``prepare_rollouts`` makes."""

from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

import pytest

from maxlm.data.loader.batches import LoaderConfig
from maxlm.rl.rollouts.source import PolicyRolloutSource
from maxlm.rl.tasks.grpo import GrpoTask
from maxlm.rl.tasks.on_policy_distillation import OnPolicyDistillationTask
from maxlm.rl.tasks.policy import PolicyTask
from maxlm.rl.tasks.ppo import PpoTask
from maxlm.rl.tasks.rloo import RlooTask
from maxlm.sharding import MeshConfig
from maxlm.tasks.extra_work import ScoringModel
from tests.errors import message

POLICY = "log-probabilities of the policy"
REFERENCE = "log-probabilities of the reference"
TEACHER = "log-probabilities of the teacher"


def make(kind: type[PolicyTask], **settings: Any) -> PolicyTask:
    return kind.model_validate(settings)


def test_sequences_are_those_that_the_source_draws():
    task = make(
        GrpoTask,
        num_samples=3,
        minibatches=2,
        epochs=5,
        sequences_per_row=2,
        rollouts={"sampling": {"max_new_tokens": 11}, "max_prompt_length": 13},
        engine={"max_sequences": 7, "page_size": 4, "shares_params": True},
    )
    work = task.generation(60, 6)
    loader: Any = LoaderConfig(seq_len=60, batch_size=6)
    source = PolicyRolloutSource(task, SimpleNamespace(loader=loader))
    assert work.num_sequences == source.num_groups * 3 == 24
    assert work.steps_per_rollout == 10
    # Half a row has 30 entries, of 31 tokens, which the engine has room for.
    assert (work.room_tokens, work.max_prompt_tokens, work.max_new_tokens) == (
        31,
        13,
        11,
    )
    assert (work.max_sequences, work.page_size) == (7, 4)
    assert work.shares_params
    assert work.sequences_per_prompt == 3
    roomy = task.engine.model_copy(update={"max_length": 29})
    shorter = task.model_copy(update={"engine": roomy})
    assert shorter.generation(60, 6).room_tokens == 29
    # What a run refuses, its plan does.
    error = message(task.generation, 60, 5)
    assert error.startswith("data.batch_size: 20 samples a rollout are no whole number")


def test_a_model_that_scores_is_told_to_the_plan():
    rewards = [
        {"kind": "length", "max_length": 9, "buffer": 2},
        {"kind": "reward_model", "name": "helpful", "run": "runs/a"},
        {"kind": "reward_model", "run": "runs/b", "mesh": {"tensor": 2}},
    ]
    models = make(GrpoTask, rewards=rewards).scoring_models()
    assert models == {
        "helpful": ScoringModel("runs/a"),
        "reward_model": ScoringModel("runs/b", MeshConfig(tensor=2)),
    }


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (make(GrpoTask), []),
        (make(GrpoTask, kl_coef=0.1), [REFERENCE]),
        (make(GrpoTask, epochs=2), [POLICY]),
        (make(RlooTask, kl_coef=0.1), [POLICY, REFERENCE]),
        (make(PpoTask, kl_coef=0.0, num_samples=1), [POLICY]),
        (make(PpoTask, kl_coef=0.1, epochs=4), [POLICY, REFERENCE]),
        (make(PpoTask, kl_coef=0.0, value_model="separate"), [POLICY, "values"]),
        (make(OnPolicyDistillationTask, teacher="runs/a", signal="divergence"), []),
        (
            make(OnPolicyDistillationTask, teacher="runs/a", signal="policy_gradient"),
            [POLICY, TEACHER],
        ),
    ],
)
def test_passes_are_those_that_a_rollout_is_prepared_with(task, names):
    passes = task.extra_passes()
    assert [extra_pass.name for extra_pass in passes] == names
    assert bool(names) == task.reads_models_of_rollouts
    for extra_pass in passes:
        _, model, passes_per_step, batches, makes_logits = astuple(extra_pass)
        others = {*task.frozen_models(), *task.auxiliary_models()}
        assert model is None or model in others
        assert passes_per_step == 1 / task.epochs
        assert batches == task.minibatches
        assert makes_logits == (extra_pass.name != "values")
