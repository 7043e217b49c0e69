"""Promise: a reward model scores each sample by itself, as its own tokenizer reads it."""

import json

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.rl.rewards.reward_model import make_preference_row
from maxlm.rl.rewards.runner import RewardRunner
from maxlm.run.config import RunConfig
from maxlm.run.load import load_run
from maxlm.run.reward_model import RewardModel
from maxlm.train.program import train_model
from maxlm.tune.references import score_texts
from tests.rl.rewards.rewarded import make_reward, make_sample
from tests.train import tiny


def test_a_sample_is_a_row_of_tuning_data():
    sample = make_sample("yes", {"prompt": "Is it?", "answer": "no"})
    assert make_preference_row(sample) == {
        "prompt": "Is it?",
        "completion": "yes",
        "answer": "no",
    }
    turns = [("assistant", "2+2"), ("tool", "4"), ("assistant", "It is 4")]
    prompt = [{"role": "system", "content": "Add."}]
    row = make_preference_row(make_sample("", {"prompt": prompt}, turns=turns))
    assert [message["role"] for message in row["messages"]] == [
        *("system", "assistant", "tool", "assistant")
    ]
    assert len(prompt) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A reward model that has learnt one step."""
    folder = tmp_path_factory.mktemp("reward_model")
    words = tiny.TEXT.split()
    with (folder / "pairs.jsonl").open("w") as file:
        for place in range(16):
            row = {"prompt": words[place % 9], "chosen": " slowly", "rejected": " wind"}
            file.write(json.dumps(row) + "\n")
    tiny.write_text(folder / "text", 4)
    settings = tiny.settings(folder, str(folder / "text"))
    settings["data"] |= {"heldout_fraction": 0, "seq_len": 32}
    settings |= {"mesh": {"data": 1}, "reporting": {"tensorboard": False}}
    settings |= {"name": "base", "train": {"steps": 1}}
    train_model(RunConfig.model_validate(settings), say=lambda _: None)
    settings["data"]["sources"] = []
    settings["model"] |= {"heads": {"score": 1}}
    settings |= {
        "name": "reward",
        "task": {"kind": "reward", "files": [str(folder / "pairs.jsonl")]},
        "train": {"steps": 1, "start_from": str(folder / "base")},
    }
    return train_model(RunConfig.model_validate(settings), say=lambda _: None).folder


@pytest.mark.more
@pytest.mark.usefixtures("compiled_once")
def test_each_sample_is_scored_by_itself(run):
    words = tiny.TEXT.split()
    samples = [
        make_sample(" ".join(words[:count]), {"prompt": words[count]}, count)
        for count in (1, 3, 2, 5, 4)
    ]
    reward = make_reward("reward_model", run=str(run), on_error=-9)
    too_long = make_sample("word " * 500, {"prompt": "a"}, 9)
    rewards = [reward, make_reward("length", max_length=9, buffer=2)]
    with RewardRunner(rewards) as runner:
        runner.check([samples[0].prompt])
        scores = runner.score([samples[0], too_long, *samples[1:]])[:, 0]
        single = [runner.score([sample])[0, 0] for sample in samples]
    assert scores[1] == -9
    rows = [
        {"prompt": sample.prompt.row["prompt"], "completion": sample.completion}
        for sample in samples
    ]
    want = score_texts(run, rows)
    assert len(set(want.tolist())) == 5
    np.testing.assert_allclose(np.delete(scores, 1), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(single, want, rtol=1e-5, atol=1e-6)
    # A policy may end at once.
    model = RewardModel(run)
    tokenizer = load_run(run).tokenizer
    end = [*tokenizer.prefix_ids, *tokenizer.encode("sea"), tokenizer.eos_id]
    assert model.encode_row({"prompt": "sea", "completion": ""}) == end
    reward = make_reward("reward_model", run=str(run.parent))
    with pytest.raises(MaxlmError, match=r"reward reward_model.*no run here"):
        RewardRunner([reward]).check([])
