"""Promise: a reward is a config of a kind, also one from outside; a list of them is
read, written and described."""

import pytest
from pydantic import TypeAdapter, ValidationError

from maxlm.config import Config
from maxlm.rl.rewards import REWARDS, Reward, RewardConfig
from maxlm.rl.rewards.runner import RewardRunner
from tests.rl.rewards.rewarded import make_sample


class VowelReward(Reward):
    """Vowels in an answer."""

    kind: str = "vowels"
    letters: str = "aeiou"

    @property
    def worker(self):
        return "caller"

    def score(self, sample):
        return sum(letter in self.letters for letter in sample.last_answer)


class Rewarded(Config):
    rewards: tuple[RewardConfig, ...]


@pytest.fixture
def _vowels():
    REWARDS.register("vowels", VowelReward)
    yield
    del REWARDS._loaded["vowels"]


@pytest.mark.usefixtures("_vowels")
def test_a_reward_from_outside_is_one_of_the_list():
    settings = {
        "rewards": [
            {"kind": "vowels", "weight": 2},
            {"kind": "length", "max_length": 9, "buffer": 3, "name": "brief"},
        ]
    }
    config = Rewarded.model_validate(settings)
    assert Rewarded.model_validate(config.model_dump()) == config
    with RewardRunner(config.rewards) as runner:
        assert runner.score([make_sample("a quiet sea")]).tolist() == [[6, 0]]


def test_all_kinds_are_described_with_their_settings():
    schema = TypeAdapter(Rewarded).json_schema()
    for kind, reward in REWARDS.items():
        properties = schema["$defs"][reward.__name__]["properties"]
        assert {"kind", "name", "weight", "time_limit"} <= set(properties)
        undescribed = {
            name for name in properties if "description" not in properties[name]
        }
        assert undescribed <= {"kind"}, kind


def test_a_kind_that_is_none_or_a_wrong_setting_is_refused():
    for settings in (
        {"kind": "exact"},
        {},
        {"kind": "math", "weight": float("nan")},
        {"kind": "math", "time_limit": 0},
        {"kind": "math", "answers": "x"},
    ):
        with pytest.raises(ValidationError):
            Rewarded.model_validate({"rewards": [settings]})
