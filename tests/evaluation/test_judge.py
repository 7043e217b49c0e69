"""Verdicts are read by FastChat's rules, and a judge that prefers a position is found
out."""

import ast
import random
import re

import pytest

from maxlm.evaluation.mt_bench import (
    format_judge_prompt,
    measure_position_bias,
    parse_score,
    parse_winner,
)
from tests.errors import message

# The rules that FastChat publishes (fastchat/llm_judge/common.py): patterns in order,
# and marks.
ONE_SCORE = re.compile(r"\[\[(\d+\.?\d*)\]\]")
ONE_SCORE_BACKUP = re.compile(r"\[(\d+\.?\d*)\]")
SHAPES = """
Rating: [[{n}]] | [[{n}]] because | [{n}] | **[[{n}]]** | [[ {n} ]] | Rating: {n} | [[{n}/10]] |
[1] then [[{n}]] | [[{n}]] and [[1]] | [[{n}] | [{n}]] | [[rating]] {n} | | [[-{n}]] | [[{n},{m}]] |
list[{m}] = {n} | [[{n}.]] | ［［{n}］］ | [[A]] not [[B]] | [[B]] | the tie is [[C]] |
[A] | [[a]] | [[B]] or [[A]] | [[C]][[B]]
"""


def score_as_fastchat(text: str) -> float:
    match = ONE_SCORE.search(text) or ONE_SCORE_BACKUP.search(text)
    return ast.literal_eval(match.groups()[0]) if match else -1


def winner_as_fastchat(text: str) -> str:
    if "[[A]]" in text:
        return "A"
    if "[[B]]" in text:
        return "B"
    return "tie" if "[[C]]" in text else "error"


def test_verdicts_are_fastchats_on_200_judgments():
    numbers = ("1", "10", "7.5", "0", "9.", "100", "3.25", "8.0")
    judgments = [
        start + shape.format(n=numbers[(i + j) % 8], m=j)
        for i, shape in enumerate(SHAPES.split("|"))
        for j, start in enumerate(["", "Good.\n", "I give [x] ", "\n\n"] * 2)
    ]
    assert len(judgments) == 200
    scores = [parse_score(text) for text in judgments]
    assert scores == [score_as_fastchat(text) for text in judgments]
    assert len({*scores}) > 8  # of many kinds
    winners = [parse_winner(text) for text in judgments]
    assert winners == [winner_as_fastchat(text) for text in judgments]
    assert {*winners} == {"A", "B", "tie", "error"}


def play(draw: random.Random, num_pairs: int, first: float):
    """Verdicts of a judge that takes the first answer with a chance, whichever it
    is."""
    orders = (("model_1", "model_2"), ("model_2", "model_1"))
    chances = [0.9 * first, 0.9 * (1 - first), 0.1]
    return [
        tuple(draw.choices((*order, "tie"), chances)[0] for order in orders)
        for _ in range(num_pairs)
    ]


@pytest.mark.parametrize("first", [0.75, 0.3, 0.95])
def test_a_judge_of_known_bias_is_caught(first):
    for seed in range(20):
        bias = measure_position_bias(play(random.Random(seed), 160, first))
        assert bias["is_biased"]
        assert bias["first_share"] == pytest.approx(first, abs=0.1)


@pytest.mark.parametrize("kind", ["coin", "opinion", "whim"])
def test_an_unbiased_judge_is_not_flagged(kind):
    """Also one whose two verdicts on a pair depend on each other: it knows the better
    answer, or takes both times the position that it likes in this pair."""
    flagged = 0
    for seed in range(200):
        draw = random.Random(seed)
        pairs = play(draw, 80, 0.5)
        if kind != "coin":
            sides = [draw.choice(("model_1", "model_2")) for _ in range(80)]
            other = {"model_1": "model_2", "model_2": "model_1"}
            pairs = [(s, s if kind == "opinion" else other[s]) for s in sides]
            assert measure_position_bias(pairs)["consistency"] == (kind == "opinion")
        flagged += measure_position_bias(pairs)["is_biased"]
    assert flagged <= 14  # 5% of 200, and two standard deviations


def test_errors_and_ties_are_no_wins():
    bias = measure_position_bias(
        [("error", "model_1"), ("tie", "tie"), ("model_1", "tie")]
    )
    assert (bias["num_pairs"], bias["consistency"], bias["first_share"]) == (
        2,
        0.5,
        1.0,
    )
    assert measure_position_bias([("error", "error")])["is_biased"] is False


def test_maths_is_judged_beside_a_reference():
    name = "single-math-v1-multi-turn"
    template = {
        "system_prompt": "s",
        "prompt_template": "{question_2} {ref_answer_2} {answer_2}",
    }
    question = {"question_id": 7, "category": "math", "turns": ["q{1}", "q2"]}
    arguments = ({name: template}, question, [["a1", "{a2}"]], 2)
    template_name, messages = format_judge_prompt(*arguments, ["r1", "r2"])
    assert template_name == name
    assert messages[1] == {"role": "user", "content": "q2 r2 {a2}"}
    assert "question 7: KeyError('ref_answer_2')" in message(
        format_judge_prompt, *arguments, ["r1"]
    )
