"""Promise: a mistake in a run of reinforcement learning is one line that says where and
what to do, before anything runs wherever it can be; and a run that a reward or an
environment ended goes on as though nothing had happened. Validation changes nothing of
what is learnt."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.models.params import flatten_names
from maxlm.rl.environments import ENVIRONMENTS, Environment, GeneratedRows
from maxlm.rl.program import train_policy
from maxlm.rl.rewards import REWARDS, Reward
from maxlm.rl.rewards.runner import RewardRunner
from maxlm.rl.rollouts.records import RolloutFiles
from maxlm.rl.samples import Prompt
from maxlm.run.config import RunConfig
from maxlm.train.program import TrainingResult
from tests.train import tiny

STEPS = 3
PROMPTS = ("a quiet sea", "grey", "the sun rises", "wind", "into")
PROMPT_FILE = "prompts.jsonl"


class LettersEnvironment(Environment):
    """Texts to continue; it fails when the third parameters are validated."""

    replies_at_once: ClassVar[bool] = True
    fails: ClassVar[bool] = False
    kind: str = "letters"
    place: str = "training"

    def open_prompts(self, seed: int) -> GeneratedRows:
        return GeneratedRows(self.make_row, "letters", len(PROMPTS))

    def make_row(self, number: int) -> dict[str, Any]:
        return {"prompt": PROMPTS[number], "place": self.place}

    def score(self, sample):
        if self.fails and max(sample.versions) == 2 and self.place == "validation":
            raise KeyError("no\nscore")
        return None


class LettersReward(Reward):
    """Counts vowels; of training it gives what it is told to, from the second rollout
    on."""

    fault: ClassVar[object] = 0.0
    kind: str = "letters"

    @property
    def worker(self):
        return "caller"

    def score(self, sample):
        is_training = sample.prompt.row.get("place") == "training"
        if is_training and max(sample.versions) == 1 and self.fault != 0.0:
            return self.fault
        return float(sum(map(ord, sample.last_answer)) % 7)


@pytest.fixture(autouse=True)
def _letters(monkeypatch):
    monkeypatch.setitem(ENVIRONMENTS._loaded, "letters", LettersEnvironment)
    monkeypatch.setitem(REWARDS._loaded, "letters", LettersReward)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tokenizer, and prompts of which two are too long."""
    folder = tmp_path_factory.mktemp("policy")
    prompts = ["the sun", "the sun rises " * 4, "a sea", "a quiet grey sea " * 5]
    lines = [json.dumps({"prompt": prompt, "answer": "x"}) for prompt in prompts]
    (folder / PROMPT_FILE).write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def parts(home) -> dict[str, Any]:
    return tiny.prepare(home)


def write(home: Path, parts: dict[str, Any]) -> Path:
    """A run that learns to write letters."""
    settings = tiny.settings(home, "") | {
        "task": {
            "kind": "grpo",
            "environment": {"kind": "letters"},
            "rewards": [{"kind": "letters"}],
            "rollouts": {"sampling": {"max_new_tokens": 5, "temperature": 0.9}},
            "engine": {"max_sequences": 8, "page_size": 4},
            "num_samples": 4,
        },
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 1},
    }
    settings["model"] |= {"num_layers": 1}
    settings |= parts | {"reporting": {"tensorboard": False}}
    settings["data"] |= {"heldout_fraction": 0, "seq_len": 16}
    path = home / "policy.yaml"
    path.write_text(json.dumps(settings))
    return path


def read(path: Path, *overrides: str) -> RunConfig:
    return load_config(RunConfig, path, overrides).value


def train(path: Path, *overrides: str) -> TrainingResult:
    return train_policy(read(path, *overrides), say=lambda _: None)


def refuse(function: Any, *arguments: Any) -> str:
    """The one line that a call ends with."""
    with pytest.raises(MaxlmError) as error:
        function(*arguments)
    line = str(error.value)
    assert "\n" not in line
    return line


REFUSED = {
    "one sample": (
        "task.num_samples=1",
        "task.num_samples: task.kind=grpo compares the samples of a prompt",
    ),
    "no such reward": (
        "task.rewards=[{kind: exact_macth}]",
        "task.rewards.0.kind must be one of 'exact_match', .* did you mean exact_match",
    ),
    "no such environment": (
        "task.environment.kind=additon",
        "task.environment.kind must be one of .* did you mean addition",
    ),
    "a reward without its kind": (
        "task.rewards=[{weight: 2}]",
        "task.rewards.0.kind is required; set it to one of 'exact_match'",
    ),
    "a setting of a reward": (
        "task.rewards=[{kind: exact_match, ansewr: x}]",
        "unknown key task.rewards.0.ansewr; did you mean task.rewards.0.answer",
    ),
    "equal answers that are compared": (
        "task.validation={num_samples: 3, environment: {kind: letters}}",
        "validation.num_samples: 3 answers .* at temperature 0",
    ),
    "the likeliest tokens alone": (
        "task.rollouts.sampling.temperature=0",
        "task.rollouts.sampling.temperature: rollouts at temperature 0 are all alike",
    ),
    "nothing that scores": ("task.rewards=[]", "task.rewards: .* nothing scores"),
    "samples that nothing compares": (
        "task={kind: on_policy_distill, teacher: x, rollouts: {zero_variance: drop}}",
        "task.rollouts.zero_variance: task.kind=on_policy_distill compares no samples",
    ),
    "validation that nothing scores": (
        "task={kind: on_policy_distill, teacher: x, rewards: [], validation: "
        "{environment: {kind: letters}}}",
        "task.rewards: answers to validation prompts are scored",
    ),
}


# Near names of a key are looked for among all settings, which takes seconds.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.heavy] if "setting" in name else [])
        for name in REFUSED
    ],
)
def test_a_wrong_setting_is_one_line(name, tmp_path):
    override, pattern = REFUSED[name]
    path = write(tmp_path, {})
    line = refuse(read, path, override)
    assert len(line) < 400
    assert re.search(pattern, line), line


UNREADY = {
    "a judge that is away": (
        {"kind": "judge", "address": "localhost:9", "question": None},
        "reward judge, http://localhost:9/.*: does not answer: .*; start it",
    ),
    "no such function": (
        {"kind": "python", "function": f"{re.__file__}:scroe"},
        "reward python, .*py: no function scroe there; correct",
    ),
    "no such module": (
        {"kind": "python", "function": "no.module:score"},
        "reward python, no.module:score: no module named no.module; correct",
    ),
    "a column that is not there": (
        {"kind": "exact_match", "answer": "truth"},
        "reward exact_match, row 4: .*truth",
    ),
}


@pytest.mark.parametrize("name", UNREADY)
def test_a_reward_that_cannot_score_is_one_line_before_training(name):
    settings, pattern = UNREADY[name]
    reward = REWARDS.get(settings["kind"]).model_validate(settings)
    prompt = Prompt(4, (1,), {"prompt": "a sea", "answer": "x"})
    with RewardRunner([reward]) as runner:
        line = refuse(runner.check, [prompt])
    assert re.search(pattern, line), line


@pytest.mark.heavy
def test_prompts_that_are_too_long_end_a_run_before_anything_is_drawn(home, parts):
    path = write(home, parts)
    prompts = f"{{kind: single_turn, files: ['{home}/{PROMPT_FILE}']}}"
    rewards = "task.rewards=[{kind: exact_match}]"
    line = refuse(train, path, "name=long", f"task.environment={prompts}", rewards)
    pattern = (
        r"prompts.jsonl: row 1: a prompt of \d+ tokens, where there is room for 12"
    )
    assert re.search(pattern + "; 2 prompts are too long; ", line), line
    assert not RolloutFiles(home / "long").list_numbers()
    # Every row is checked, and not those of the first rollout alone.
    rows = [{"prompt": "the sun", "answer": "x"}] * 40
    text = "\n".join(map(json.dumps, [*rows, {"prompt": "a sea"}]))
    (home / "rows.jsonl").write_text(text)
    prompts = f"{{kind: single_turn, files: ['{home}/rows.jsonl']}}"
    settings = (f"task.environment={prompts}", "data.shuffle=false", rewards)
    line = refuse(train, path, "name=unanswered", *settings)
    assert re.search(r"exact_match, .*rows.jsonl: row 40: no column 'answer'", line), (
        line
    )


def test_prompts_that_are_not_there_are_refused_before_models_are_read(tmp_path):
    path = write(tmp_path, {})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("of Hugging Face, and damaged")
    settings = (f"train.start_from={tmp_path}/base", "task.rewards=[{kind: letters}]")
    prompts = "{kind: single_turn}"
    line = refuse(train, path, *settings, f"task.environment={prompts}")
    assert line.startswith("task.environment.files: environment.kind=single_turn")
    assert line.endswith("--prompts FILE")
    prompts = "{kind: single_turn, files: [nowhere.jsonl]}"
    line = refuse(train, path, *settings, f"task.validation={{environment: {prompts}}}")
    assert line.startswith("task.validation.environment.files, ")
    assert "nowhere.jsonl: no such file" in line


def test_a_run_from_nothing_has_no_tokenizer(tmp_path):
    path = write(tmp_path, {"data": {"seq_len": 16}})
    line = refuse(train, path)
    assert line.startswith("train.start_from: no tokenizer, and no model to start from")
    assert "--base FOLDER" in line


def test_a_reference_has_the_policy_s_vocabulary(tmp_path):
    config = read(write(tmp_path, {}), "task.kl_coef=0.1")
    other = config.model.model_copy(update={"vocab_size": 303})
    frozen = {"reference": other}
    line = refuse(config.task.check_frozen_models, config.model, frozen)
    assert line.startswith("task.reference: the reference has 303 ids")


def read_records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.more
@pytest.mark.usefixtures("compiled_once")
def test_a_failure_loses_nothing_and_validation_changes_nothing(
    home, parts, monkeypatch
):
    path = write(home, parts)
    whole = train(path, "name=whole")
    overrides = [
        "name=spoilt",
        "train.eval_every=1",
        "task.validation={num_prompts: 99, temperature: 1, num_samples: 2, "
        "environment: {kind: letters, place: validation}}",
    ]
    # In the second rollout, and when the next parameters are validated.
    monkeypatch.setattr(LettersReward, "fault", None)
    line = refuse(train, path, *overrides)
    assert line.startswith("reward letters, row ")
    assert "sample 0: returned None; return one finite number" in line
    monkeypatch.setattr(LettersReward, "fault", 0.0)
    monkeypatch.setattr(LettersEnvironment, "fails", True)
    line = refuse(train, path, *overrides)
    assert line.startswith("environment.kind=letters, row ")
    assert "KeyError: 'no\\nscore'" in line
    monkeypatch.setattr(LettersEnvironment, "fails", False)
    spoilt = train(path, *overrides)
    assert spoilt.start_step > 0

    params = flatten_names(spoilt.state.params)
    for name, param in flatten_names(whole.state.params).items():
        np.testing.assert_array_equal(params[name], param, name)
    for number in range(STEPS):
        rollout = RolloutFiles(home / "spoilt").read(number)
        expected = RolloutFiles(home / "whole").read(number)
        assert rollout is not None
        assert expected is not None
        assert rollout.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(rollout[name], array, name)

    # Each step once, of its answers, whatever was validated before a failure.
    records = read_records(home / "spoilt", "metrics.jsonl")
    rewards = {r["step"]: r["eval_reward"] for r in records if "eval_reward" in r}
    answers = read_records(home / "spoilt", "samples/validation.jsonl")
    assert [answer["step"] for answer in answers] == np.repeat([1, 2, 3], 10).tolist()
    for step, reward in rewards.items():
        scores = [a["reward"] for a in answers if a["step"] == step]
        assert reward == pytest.approx(np.mean(scores))
        assert {tuple(a["versions"]) for a in answers if a["step"] == step} == {
            (step, step)
        }
    assert sorted(rewards) == [1, 2, 3]
    assert len(set(rewards.values())) > 1
    for record in records:
        if "engine_ratio" in record:
            assert record["engine_ratio"] == pytest.approx(1, abs=1e-5)
    events = read_records(home / "spoilt", "events.jsonl")
    assert {e["step"] for e in events if e["event"] == "evaluate"} == {1, 2, 3}
