"""Promise: the answer is what the policy's last turn says it is, and two answers are
the same only if they are but for how they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.rl.rewards.answers import (
    extract_answer,
    normalize_answer,
    parse_number,
    read_last_box,
)
from tests.rl.rewards.rewarded import make_reward, make_sample


@pytest.mark.parametrize(
    ("extraction", "text", "answer"),
    [
        ("tags", "so <answer>5</answer>", "5"),
        ("tags", "<answer>4</answer> no: <answer>5</answer>.", "5"),
        ("tags", "<answer>4</answer> no: <answer>5", None),
        ("tags", "<answer>4 <answer>5</answer>", "5"),
        ("tags", "<answer></answer>", ""),
        ("tags", "5", None),
        ("tags", "5</answer>", None),
        ("boxed", r"\boxed{4} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{4} then \boxed{\frac{1}{2}", None),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{\boxed{3}}", r"\boxed{3}"),
        ("boxed", r"\fbox {x}", "x"),
        ("boxed", "boxed{x}", None),
        ("last_number", "48 + 24 is 1,072.50, or so.", "1,072.50"),
        ("last_number", "it is 5-3", "3"),
        ("last_number", "it is -3.", "-3"),
        ("last_number", "a1 b2", None),
        ("code_block", "```python\nx = 1\n```\nor\n```\ny\n```", "y\n"),
        ("code_block", "```python\nx = 1", None),
        ("whole", " a b ", " a b "),
    ],
)
def test_the_last_answer_is_read(extraction, text, answer):
    assert extract_answer(text, extraction) == answer


@given(st.text("{}\\ab", max_size=12))
def test_a_box_is_read_whole(inside):
    """What a box holds is found where its braces match, by another count of them."""
    plain = inside.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
    depth = 0
    is_balanced = not plain.endswith("\\")
    for character in plain:
        depth += {"{": 1, "}": -1}.get(character, 0)
        is_balanced = is_balanced and depth >= 0
    if is_balanced and depth == 0:
        assert read_last_box(f"a \\boxed{{{inside}}} b") == inside


@pytest.mark.parametrize(
    ("left", "right", "is_same"),
    [
        ("1,000.0", "+1000", True),
        ("1,2", "12", False),
        ("1,00", "100", False),
        ("0.10", ".1", True),
        ("1e3", "1000", True),
        ("−5", "-5", True),
        ("$72.", "**72**", True),
        ("The  Cat", "the cat.", True),
        ("cat", "cats", False),
        ("½", "1/2", False),
        ("nan", "NaN", True),
        ("-0", "0", True),
        ("...", "", False),
        ("٣", "3", False),
    ],
)
def test_answers_are_the_same_but_for_how_they_are_written(left, right, is_same):
    assert (normalize_answer(left) == normalize_answer(right)) is is_same


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_numbers_are_read_as_they_are_written(number):
    if abs(number) < 10**20:
        assert parse_number(f"{number:,.3f}") == number
        assert parse_number(f"{number:.3f}") == number


def score(reward, text, row, turns=None):
    return reward.score(make_sample(text, row, turns=turns))


def test_exact_match_scores_the_answer_alone():
    reward = make_reward("exact_match")
    row = {"answer": "12", "prompt": "What is 5 + 7? <answer>12</answer>"}
    assert score(reward, "It is <answer>12</answer>", row) == 1
    assert score(reward, "It is <answer>13</answer>", row) == 0
    # Nothing is read of the prompt, of tools, or of turns before.
    assert score(reward, "", row) == 0
    turns = [
        ("assistant", "<answer>12</answer>"),
        ("tool", "<answer>12</answer>"),
        ("assistant", "I do not know"),
    ]
    assert score(reward, "", row, turns=turns) == 0
    for empty in ("<answer></answer>", "<answer> \n</answer>", "<answer>", "12"):
        assert score(reward, empty, row) == 0
        assert score(reward, empty, row | {"answer": ["12", "0"]}) == 0


def test_scores_do_not_change_with_the_prompt():
    """Of an answer that is no function of it, whatever the prompt holds."""
    rewards = [
        make_reward("exact_match", extract=extraction)
        for extraction in ("tags", "boxed", "last_number", "whole")
    ]
    for text in ("5 + 7", "<answer>5</answer>", r"\boxed{}", "none"):
        for reward in rewards:
            scores = {
                score(reward, text, {"answer": "12", "prompt": prompt})
                for prompt in ("What is 5 + 7?", "", "12", "<answer>12</answer>")
            }
            assert scores == {0.0}


def test_exact_match_reads_columns_of_many_forms():
    answers = [8.0, ["8", "eight"], "so 3 + 5 = 8\n#### 8"]
    patterns = [None, None, "#### (.*)"]
    for answer, pattern in zip(answers, patterns, strict=True):
        reward = make_reward("exact_match", answer_pattern=pattern)
        assert score(reward, "<answer>8</answer>", {"answer": answer}) == 1
        assert score(reward, "<answer>3</answer>", {"answer": answer}) == 0
    with pytest.raises(MaxlmError, match="answer_pattern matches nothing"):
        make_reward("exact_match", answer_pattern="#### (.*)").check_row(
            {"answer": "8"}
        )
    for row in ({}, {"answer": None}, {"answer": " "}, {"answer": []}):
        with pytest.raises(MaxlmError, match="column 'answer'"):
            make_reward("exact_match").check_row(row)


def test_an_answer_can_be_wanted_behind_thoughts():
    reward = make_reward("exact_match", extract="whole", after="</think>")
    assert score(reward, "<think>5?</think> 12", {"answer": "12"}) == 1
    assert score(reward, "12", {"answer": "12"}) == 0
    assert score(reward, "<think>12</think>", {"answer": "12"}) == 0


def test_a_pattern_is_scored_in_a_process_that_can_be_killed():
    reward = make_reward("exact_match", extract="regex", pattern="= (\\d+)")
    assert score(reward, "5 = 5, 6 = 12", {"answer": "12"}) == 1
    assert reward.worker == "process"
    assert make_reward("exact_match").worker == "caller"
    with pytest.raises(MaxlmError, match="set both"):
        make_reward("exact_match", extract="regex")
    with pytest.raises(MaxlmError, match="no regular expression"):
        make_reward("format", pattern="(")
