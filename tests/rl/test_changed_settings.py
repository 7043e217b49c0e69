"""Promise: what ends a run for a failure of something else can be changed, and the run
goes on with the rollouts that it has; what decides what is learnt cannot."""

from pathlib import Path

import pytest
import yaml

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.rl.rollouts.source import _digest_settings
from maxlm.run.config import RunConfig
from maxlm.train.resume import check_same_config
from tests.rl import policy_runs

REWARDS = [
    {"kind": "code", "name": "tests"},
    {"kind": "judge", "address": "localhost:8000"},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    return Path(policy_runs.write_config(folder, {}, rewards=REWARDS))


def read(path: Path, setting: str = "task.kind", value: object = "grpo") -> RunConfig:
    return load_config(RunConfig, path, [f"{setting}={yaml.safe_dump(value)}"]).value


def digest(config: RunConfig, skips=()) -> str:
    return _digest_settings(config, skips)


def check(config: RunConfig, path: Path) -> None:
    """Resumes a run of ``path`` with another config."""
    check_same_config(config, read(path).model_dump(mode="json"), "here")


MAY_CHANGE = {
    "task.rollouts.environment_errors": "end_episode",
    "task.rollouts.reply_seconds": 7.5,
    "task.rollouts.reply_threads": 3,
    "task.rollouts.keep_records": 5,
    "task.rewards[0].time_limit": 77.0,
    "task.rewards[0].on_timeout": None,
    "task.rewards[0].num_programs": 2,
    "task.rewards[1].on_error": 0.0,
    "task.rewards[1].address": "localhost:9000",
    "task.rewards[1].num_requests": 3,
    "task.validation": {"environment": {"kind": "addition"}},
    "task.generation_mesh": {"data": 1},
}
MAY_NOT_CHANGE = {
    "task.rollouts.staleness": 1,
    "task.rewards[0].weight": 0.5,
    "task.rewards[1].rubric": "Is it short?",
    "task.engine.max_sequences": 3,
    "task.num_samples": 2,
}


@pytest.mark.parametrize("setting", MAY_CHANGE)
def test_a_run_goes_on_with_another(setting: str, path: Path):
    config = read(path, setting, MAY_CHANGE[setting])
    assert config != read(path)
    check(config, path)
    assert digest(config) == digest(read(path))


@pytest.mark.parametrize("setting", MAY_NOT_CHANGE)
def test_a_run_is_another_with_another(setting: str, path: Path):
    config = read(path, setting, MAY_NOT_CHANGE[setting])
    with pytest.raises(MaxlmError, match="the checkpoint was written with another"):
        check(config, path)
    assert digest(config) != digest(read(path))


def test_rollouts_are_those_of_their_schedule_and_skips(path: Path):
    assert digest(read(path, "train.steps", 9)) != digest(read(path))
    assert digest(read(path), ((1, 2),)) != digest(read(path))
