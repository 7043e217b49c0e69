"""Promise: a mathematical answer is scored by what it means, in any thread; the known
faults of math-verify are no faults of the reward."""

import threading

import pytest
from math_verify import parse, verify

from maxlm.rl.rewards.mathematics import is_same_answer
from maxlm.rl.rewards.runner import RewardRunner
from tests.rl.rewards.rewarded import make_reward, make_sample

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    ("right", "answer", "is_same"),
    [
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac12", True),
        ("3\\sqrt{2}", "\\sqrt{18}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x+1", "y+1", False),
        ("72", r"$\text{72}$", True),
        ("1000", "1,000", True),
        ("5", "5 cm", True),
        ("90", r"90^\circ", True),
        ("300000000", r"3 \times 10^8", True),
        (r"50\%", "50%", True),
        (r"\{1,2\}", "2, 1", True),
        ("1", "1, 2, 3", False),
        # Math-Verify#26: equal lines.
        ("2x+4y-3=0", r"y = -\frac{1}{2}x + \frac{3}{4}", True),
        # Math-Verify#76: bold type.
        ("73", "**73**", True),
        # Math-Verify#14: tiny numbers, terms of a series, signs.
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False),
        (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}", False),
        (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1", False),
        (r"1 - \frac{1}{\mathrm{e}}", r"1 - \frac{1}{\mathrm{f}}", False),
        (r"\pm 2021", "2021", False),
        ("12:00", "1:00", False),
        # The question is no answer to itself.
        ("5", "2+3", False),
        ("5", r"\frac{10}{2}", False),
        ("8", "2^3", False),
        ("5", "", False),
    ],
)
def test_answers_are_the_same_by_what_they_mean(right, answer, is_same):
    assert is_same_answer(right, answer) is is_same
    assert is_same_answer(right, right)


def test_arithmetic_can_be_allowed():
    assert is_same_answer("5", "2+3", allow_arithmetic=True)
    assert not is_same_answer("5", "2+4", allow_arithmetic=True)


def test_scores_off_the_main_thread_within_their_limits():
    """Where math-verify itself, with its time limits, says nothing is right."""
    row = {"answer": "1/2"}
    samples = [
        make_sample(r"\boxed{\frac{1}{2}}", row, 0),
        # No signal interrupts this: it takes for ever in one operation.
        make_sample(r"\boxed{9^{9^{9^{9}}} + x}", row, 1),
        make_sample(r"\boxed{\frac{1}{3}}", row, 2),
        make_sample(r"It is \boxed{}", row, 3),
        make_sample(r"\boxed{0.5}", row, 4),
        make_sample(r"It is \frac{1}{2}", row, 5),
    ]
    results: list = []

    def score() -> None:
        try:
            right = verify(parse("$1/2$"), parse(r"$\frac{1}{2}$"))
        except ValueError:
            right = None
        with RewardRunner([make_reward("math", time_limit=3)], workers=2) as runner:
            results.append((right, runner.score(samples)[:, 0].tolist()))
            results.append(runner.num_timed_out)

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert not results[0][0]
    assert results[0][1] == [1, 0, 0, 0, 1, 0]
    assert results[1] == {"math": 1}
