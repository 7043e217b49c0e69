"""Promise: rewards of an answer's form follow their formulas."""

import pytest

from maxlm.config import MaxlmError
from tests.rl.rewards.rewarded import make_reward, make_sample


def test_the_length_penalty_is_that_of_dapo():
    """Equation 13 of 2503.14476, with L_max = 10 and L_cache = 4."""
    reward = make_reward("length", max_length=10, buffer=4)
    penalties = [
        reward.score(make_sample("", num_sampled=length)) for length in range(14)
    ]
    assert penalties == [0] * 7 + [-0.25, -0.5, -0.75] + [-1] * 4
    with pytest.raises(MaxlmError, match="buffer=4 is longer than max_length=3"):
        make_reward("length", max_length=3, buffer=4)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a\nb</think>\n<answer>5</answer>\n", 1),
        ("<think></think><answer>5</answer>", 1),
        ("<think>a</think><answer> </answer>", 0),
        ("well, <think>a</think><answer>5</answer>", 0),
        ("<answer>5</answer>", 0),
        ("", 0),
    ],
)
def test_the_format_is_that_of_the_whole_answer(text, score):
    assert make_reward("format").score(make_sample(text)) == score


def test_an_environment_scores_or_says_that_it_does_not():
    sample = make_sample("")
    reward = make_reward("environment")
    with pytest.raises(MaxlmError, match="gave no score"):
        reward.score(sample)
    sample.environment_reward = 0.25
    assert reward.score(sample) == 0.25


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"age": 3}', 1),
        ('{"age": -3}', 0),
        ('{"age": NaN}', 0),
        ("{}", 0),
        ('Here: {"age": 3}', 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_follows_the_schema(text, score):
    row = {"schema": SCHEMA}
    assert make_reward("json_schema").score(make_sample(text, row)) == score
    reward = make_reward("json_schema", schema_of_all=SCHEMA)
    assert reward.score(make_sample(text)) == score


def test_a_schema_that_is_none_is_refused_and_no_address_is_fetched():
    with pytest.raises(MaxlmError, match=r"no JSON schema: .*'integr'"):
        make_reward("json_schema").check_row({"schema": '{"type": "integr"}'})
    with pytest.raises(MaxlmError, match="is no JSON"):
        make_reward("json_schema").check_row({"schema": "{"})
    with pytest.raises(Exception, match="Unresolvable"):
        make_reward("json_schema").score(
            make_sample("3", {"schema": {"$ref": "http://127.0.0.1:9/schema"}})
        )
