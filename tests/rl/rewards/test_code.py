"""Promise: a program scores by the tests it passes, and by no way around them."""

import pytest

from maxlm.config import MaxlmError
from maxlm.evaluation.sandbox import SandboxLimits
from maxlm.rl.rewards.code import read_tests, run_test
from maxlm.rl.rewards.runner import RewardRunner
from tests.rl.rewards.rewarded import make_reward, make_sample

pytestmark = pytest.mark.heavy
STATEMENTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
DOUBLE = {"inputs": ["3\n", "4\n"], "outputs": ["6\n", "8"]}
CALLS = {"inputs": [[1, 2], [2, 2]], "outputs": [3, [4]], "fn_name": "add"}
LIMITS = SandboxLimits(10)

RIGHT = [
    ("def add(a, b): return a + b", STATEMENTS),
    ("import numpy as np\ndef add(a, b): return np.int64(a) + b", STATEMENTS),
    ("print(int(input()) * 2)", DOUBLE),
    ("class Solution:\n    def add(self, a, b): return a + b", CALLS),
    (
        "if __name__ == '__main__': print(input() + ' ')",
        {"inputs": ["a b"], "outputs": ["a b"]},
    ),
]
ALWAYS_EQUAL = "class Any(int):\n    __eq__ = lambda self, other: True\n"
WRONG = [
    ("def add(a, b): return 3", STATEMENTS),
    ("raise SystemExit(0)", STATEMENTS),
    ("import os; os._exit(0)", STATEMENTS),
    ("", STATEMENTS),
    (f"{ALWAYS_EQUAL}def add(a, b): return Any()", STATEMENTS),
    (f"{ALWAYS_EQUAL}def add(a, b): return [Any()]", "assert add(1, 2) == [3]"),
    ("abs = lambda x: 0\ndef add(a, b): return 9", "assert abs(add(1, 2) - 3) < 1e-6"),
    (
        "import builtins\nbuiltins.abs = lambda x: 0\ndef add(a, b): return 9",
        "assert abs(add(1, 2) - 3) < 1e-6",
    ),
    ("import program\nprogram.run = print\ndef add(a, b): return 9", STATEMENTS),
    ("print(6)", DOUBLE),
    ("print(int(input()) * 2); raise SystemExit(1)", DOUBLE),
    ("def add(a, b): return a - b", CALLS),
    ("def plus(a, b): return a + b", CALLS),
    ("open('/etc/passwd', 'a').write('x')\ndef add(a, b): return a + b", STATEMENTS),
    (
        "import socket\nsocket.create_connection(('192.0.2.1', 80), 1)\n"
        "def add(a, b): return a + b",
        STATEMENTS,
    ),
]


def make_program(program, tests, number=0):
    text = f"Here it is:\n```python\n{program}\n```\n"
    return make_sample(text, {"tests": tests}, number)


def test_programs_are_scored_right_and_no_hang_delays_others():
    programs = [*RIGHT, *WRONG]
    hang = ("import time\ntime.sleep(30)\ndef add(a, b): return a + b", STATEMENTS)
    samples = [
        make_program(*case, number) for number, case in enumerate([hang, *programs])
    ]
    reward = make_reward("code", test_seconds=3, num_programs=2)
    with RewardRunner([reward]) as runner:
        scores = runner.score(samples)[:, 0].tolist()
    expected = [0] + [1] * len(RIGHT) + [0] * len(WRONG)
    wrongly_scored = [
        sample.last_answer
        for sample, score, right in zip(samples, scores, expected, strict=True)
        if score != right
    ]
    assert wrongly_scored == []


def test_a_share_of_tests_can_be_scored():
    tests = ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(0, 0) == 0"]
    sample = make_program("def add(a, b): return 3 if a else 0", tests)
    reward = make_reward("code", credit="fraction")
    assert reward.score(sample) == pytest.approx(2 / 3)
    reward = make_reward("code", credit="fraction", max_tests=1)
    assert reward.score(sample) == 1
    assert make_reward("code").score(sample) == 0
    assert make_reward("code").score(make_sample("no program", {"tests": tests})) == 0


def test_what_a_program_says_is_no_part_of_what_it_writes_to_errors():
    program = "import sys\nprint('noise', file=sys.stderr)\nprint(6)"
    (test,) = read_tests([{"input": "", "output": "6"}])
    assert run_test(program, test, LIMITS)


@pytest.mark.parametrize(
    "tests", ["", " ", 5, [], {"inputs": ["1"]}, {"inputs": [1], "outputs": []}, [{}]]
)
def test_tests_that_cannot_be_read_are_refused_before_training(tests):
    with pytest.raises(MaxlmError, match="no tests that can be read"):
        make_reward("code").check_row({"tests": tests})
