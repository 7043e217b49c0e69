"""Promise: the recipe and the reward that docs/rl.md shows are ones."""

from pathlib import Path

import yaml
from pydantic import TypeAdapter

from maxlm.rl.rewards import RewardConfig
from maxlm.run.load_config import load_run_config
from tests.rl.rewards.rewarded import make_sample

PAGE = (Path(__file__).parents[2] / "docs" / "rl.md").read_text()


def read_block(section: str, language: str) -> str:
    """The first block of a language in a section."""
    text = PAGE.partition(f"### {section}\n")[2]
    return text.partition(f"```{language}\n")[2].partition("```")[0]


def test_the_recipe(tmp_path):
    path = tmp_path / "solver.yaml"
    path.write_text(read_block("A recipe of one's own", "yaml"))
    config = load_run_config(str(path))
    settings = config.task.model_dump(include={"environment", "validation"})
    training = settings["environment"]
    validation = settings["validation"]["environment"]
    # The same questions of other files.
    assert training["chat"]
    assert training.pop("files") != validation.pop("files")
    assert training == validation
    assert config.train.eval_every > 0
    # GSM8K's column of answers.
    (reward,) = config.task.model_dump()["rewards"]
    math = TypeAdapter(RewardConfig).validate_python(reward)
    row = {"answer": "3 · 4 = 12\n#### 12"}
    for text, score in (("so \\boxed{12}", 1), ("12", 0), ("\\boxed{3}", 0)):
        assert math.score(make_sample(text, row)) == score


def test_the_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = "A reward of one's own"
    Path("rewards.py").write_text(read_block(section, "python"))
    (settings,) = yaml.safe_load(read_block(section, "yaml"))["rewards"]
    reward = TypeAdapter(RewardConfig).validate_python(settings)
    reward.check_setup()
    score = reward.open()
    row = {"keyword": "Sea"}
    for text, expected in (("the sea", 1), ("a see", 0), ("sea " * 51, 0)):
        assert score(make_sample(text, row)) == expected
