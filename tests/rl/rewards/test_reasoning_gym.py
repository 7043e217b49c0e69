"""Promise: tasks of reasoning-gym are scored by their own scorers, where these are
sound."""

import sys

import pytest

from maxlm.config import MaxlmError
from maxlm.rl.reasoning_gym_package import import_reasoning_gym
from maxlm.rl.rewards.runner import RewardRunner
from tests.rl.rewards.rewarded import make_reward, make_sample

pytestmark = pytest.mark.heavy
pytest.importorskip("zss")  # as an incomplete installation is


def make_row(task: str) -> dict:
    dataset = import_reasoning_gym().create_dataset(task, seed=3, size=5)
    return {"dataset": task, **dataset[4]}


def test_answers_are_scored_by_their_task():
    """Of three tasks: the right answer, another form of it, a wrong one, and one that
    lists many."""
    chain = make_row("chain_sum")
    half = make_row("decimal_arithmetic")
    words = make_row("word_sorting")
    cases = [
        (chain, chain["answer"], 1),
        (chain, f"{float(chain['answer'])}", 1),
        (chain, f"{int(chain['answer']) + 1}", 0),
        (chain, " ".join(str(n) for n in range(-2000, 2000)), 0),
        (chain, "", 0),
        (half, half["answer"], 1),
        (words, words["answer"], 1),
        (words, ", ".join(reversed(words["answer"].split(", "))), 0),
    ]
    samples = [
        make_sample(f"<answer>{answer}</answer>", row, number)
        for number, (row, answer, _) in enumerate(cases)
    ]
    with RewardRunner([make_reward("reasoning_gym")], workers=1) as runner:
        runner.check([sample.prompt for sample in samples])
        scores = runner.score(samples)[:, 0].tolist()
    assert scores == [score for *_, score in cases]


def test_partial_credit_is_a_choice():
    """The task's own score of an answer among other words is more than nothing."""
    row = make_row("chain_sum")
    sample = make_sample(f"<answer>it is {row['answer']}</answer>", row)
    assert make_reward("reasoning_gym").score(sample) == 0
    score = make_reward("reasoning_gym", partial_credit=True).score(sample)
    assert 0 < score < 1  # type: ignore[operator]


def test_a_task_that_is_none_is_one_line():
    with pytest.raises(MaxlmError, match="no column 'dataset'"):
        make_reward("reasoning_gym").check_row({"answer": "1"})
    sample = make_sample("<answer>1</answer>", {"answer": "1"})
    with pytest.raises(MaxlmError, match="no task 'chain'"):
        make_reward("reasoning_gym", task="chain").score(sample)


def test_nothing_that_has_to_be_compiled_is_needed():
    import_reasoning_gym()
    assert "pycosat" not in sys.modules
