"""Promise: each sample has one score, its own, whatever rewards do: one that hangs
delays its sample alone, and one that fails is one line that names it."""

import threading
import time

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.rl.advantages import sum_scores
from maxlm.rl.rewards.runner import RewardRunner
from tests.rl.rewards.rewarded import (
    HERE,
    make_function_reward,
    make_reward,
    make_sample,
)

pytestmark = pytest.mark.heavy
LIMITS = {"time_limit": 2, "on_timeout": -2}


@pytest.fixture(scope="module")
def runner():
    """Two warm processes; the first reward misbehaves, the others do not."""
    rewards = [
        make_function_reward("misbehave", {"name": "misbehaving"}),
        make_function_reward("tell_time", {"name": "time"} | LIMITS),
        make_function_reward("count_letters", {"name": "letters"} | LIMITS),
    ]
    with RewardRunner(rewards, workers=2) as runner:
        runner.score([make_sample("warm", number=number) for number in range(2)])
        yield runner


def test_a_sample_that_hangs_delays_no_other(runner):
    texts = ["hang", "a", "bb", "ccc", "dddd", "eeeee"]
    samples = [make_sample(text, number=n) for n, text in enumerate(texts)]
    began = time.monotonic()
    scores = runner.score(samples)
    assert time.monotonic() - began < 10  # not 30
    assert scores[:, 2].tolist() == [4, 1, 2, 3, 4, 5]
    assert scores[0, 1] == -2
    # Their clocks, before the limit of the one that hangs.
    assert (scores[1:, 1] - began < 2).all()
    assert runner.num_timed_out == {"misbehaving": 0, "time": 1, "letters": 0}


def test_a_process_whose_interpreter_is_held_is_killed_and_replaced(runner):
    samples = [make_sample(text) for text in ("hold", "aa", "bbb")]
    assert runner.score(samples)[:, 2].tolist() == [-2, 2, 3]
    assert runner.score(samples[1:])[:, 2].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise", r"raised KeyError: 'score' \(rewarded.py:\d+\)"),
        ("exit", r"its process ended \(exit code 3\)"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("none", "returned None"),
        ("two", "returned 2 values for one sample"),
        ("text", "returned '0.5', a str"),
    ],
)
def test_a_reward_that_fails_is_one_line(runner, text, message):
    samples = [make_sample("fine", number=1), make_sample(text, number=2)]
    pattern = f"^reward misbehaving, row 7, sample 2: {message}; .*set on_error"
    with pytest.raises(MaxlmError, match=pattern) as caught:
        runner.score(samples)
    assert "\n" not in str(caught.value)
    # The next is scored as if nothing had been.
    assert runner.score([make_sample("fine")])[0, 0] == 1


def test_failures_can_count_as_scores_and_are_counted():
    reward = make_function_reward("misbehave", {"on_error": -1})
    with RewardRunner([reward], workers=1) as runner:
        texts = ["nan", "fine", "raise", "exit", "fine"]
        scores = runner.score([make_sample(text) for text in texts])
        assert scores[:, 0].tolist() == [-1, 1, -1, -1, 1]
        assert runner.num_failed == {"python": 3}
        expected = {"reward_failures/python": 3, "reward_timeouts/python": 0}
        assert runner.count_failures() == expected


@pytest.mark.more
def test_samples_behind_hung_workers_get_one_more():
    """The one worker there is hangs for all of the test."""
    reward = make_function_reward("tell_time", {"time_limit": 15, "on_timeout": None})
    with RewardRunner([reward], workers=1) as runner:
        runner.score([make_sample("warm")])
        began = time.monotonic()
        hung = make_sample("hang")
        runner.submit(hung)
        others = [make_sample("a", number=n) for n in range(3)]
        scores = runner.score(others)
        assert (scores[:, 0] - began < 14).all()
        with pytest.raises(MaxlmError, match="sample 0: took longer than 15 s"):
            runner.collect([hung])


def test_a_reward_that_is_silent_of_all_samples_is_refused(runner):
    samples = [make_sample("hang", number=number) for number in range(2)]
    with pytest.raises(MaxlmError, match="reward time: all 2 samples took longer"):
        runner.score(samples)


def test_scores_are_in_the_order_of_samples_in_any_thread(runner):
    """Longer texts, which come first, are not told apart by when they are done."""
    samples = [
        make_sample("x" * (20 - number), number=number % 3, row_number=number // 3)
        for number in range(20)
    ]
    scores = []
    for sample in reversed(samples):
        runner.submit(sample)
    thread = threading.Thread(target=lambda: scores.append(runner.collect(samples)))
    thread.start()
    thread.join()
    assert scores[0][:, 2].tolist() == [20 - number for number in range(20)]


def test_a_module_that_cannot_be_imported_is_one_line():
    reward = make_reward("python", function="no_such_package.rewards:score")
    with (
        RewardRunner([reward], workers=1) as runner,
        pytest.raises(MaxlmError, match="no module named no_such_package"),
    ):
        runner.score([make_sample("")])
    with pytest.raises(MaxlmError, match=r"no_file.py: no such file"):
        RewardRunner([make_reward("python", function="no_file.py:score")]).check([])
    with pytest.raises(MaxlmError, match="names no function"):
        make_reward("python", function="score")
    reward = make_reward("python", function=f"{HERE}:nothing")
    with (
        RewardRunner([reward], workers=1) as runner,
        pytest.raises(MaxlmError, match="no function nothing there"),
    ):
        runner.score([make_sample("")])


def test_rows_are_checked_before_training():
    rewards = [
        make_reward("exact_match"),
        make_reward("math", answer="solution"),
        make_reward("length", max_length=5, buffer=2),
    ]
    row = {"answer": "1", "solution": "2"}
    prompts = [
        make_sample("", row, row_number=3).prompt,
        make_sample("", {"answer": "1"}, row_number=4).prompt,
    ]
    with RewardRunner(rewards) as runner:
        runner.check(prompts[:1])
        with pytest.raises(
            MaxlmError,
            match=r"reward math, row 4: no column 'solution'.*prompt, answer",
        ):
            runner.check(prompts)
    with pytest.raises(MaxlmError, match="two rewards are called length"):
        RewardRunner([rewards[2], rewards[2]])


def test_totals_are_weighted_sums_in_float64():
    rewards = [
        make_reward("exact_match", weight=0.1),
        make_reward("length", weight=-0.3, name="brief", max_length=4, buffer=2),
    ]
    texts = ["<answer>1</answer>", "<answer>2</answer>"]
    samples = [make_sample(text, {"answer": "1"}) for text in texts]
    with RewardRunner(rewards) as runner:
        scores = runner.score(samples)
    assert scores.dtype == np.float64
    assert scores.tolist() == [[1, -0.5], [0, -0.5]]
    totals = sum_scores(scores, [reward.weight for reward in rewards])
    assert totals.tolist() == [0.1 + -0.3 * -0.5, -0.3 * -0.5]
    assert [reward.name for reward in rewards] == ["exact_match", "brief"]
