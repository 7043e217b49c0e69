"""Preference runs from beginning to end: a reward model from a language model, its
scores, a reference that is read once and for all, and what a run says of held-out
rows."""

import json

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.params import flatten_names
from maxlm.plan.predict import plan_run
from maxlm.run.config import RunConfig
from maxlm.run.setup import set_up_run
from maxlm.train.program import train_model
from maxlm.tune.references import precompute_reference_log_probs, score_texts
from tests.train import tiny

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("compiled_once")]
WORDS = tiny.TEXT.split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pairs in which a known word is better than another, a text, and a run on that
    text."""
    folder = tmp_path_factory.mktemp("preference")
    random = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(48):
            prompt = " ".join(random.choice(WORDS, random.integers(1, 4)))
            row = {"prompt": prompt, "chosen": " slowly", "rejected": " into wind"}
            row |= {
                "completion": row["chosen" if i % 2 else "rejected"],
                "label": bool(i % 2),
            }
            file.write(json.dumps(row) + "\n")
    tiny.write_text(folder / "text", 4)
    train(make_config(folder, "base", {"kind": "clm"}, train={"steps": 2}))
    return folder


def make_config(folder, name, task, **parts) -> RunConfig:
    settings = tiny.settings(folder, str(folder / "text")) | {
        "name": name,
        "task": task,
    }
    settings["data"] |= {"heldout_fraction": 0, "seq_len": 32}
    if task["kind"] != "clm":
        task = {
            "files": [str(folder / "pairs.jsonl")],
            "validation_fraction": 0.2,
        } | task
        settings["data"]["sources"] = []
        settings |= {
            "task": task,
            "train": {"steps": 3, "start_from": str(folder / "base")},
        }
    if task["kind"] == "reward":
        settings["model"] |= {"heads": {"score": 1}}
    settings |= {"mesh": {"data": 4, "fsdp": 2}, "reporting": {"tensorboard": False}}
    settings |= {"sharding": {"max_unsharded": 1}}
    return RunConfig.model_validate(settings | parts)


def train(config):
    return train_model(config, say=lambda _: None)


def read_records(result):
    return list(
        map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
    )


@pytest.mark.more
def test_a_reward_model_learns_from_a_language_model_and_scores_texts(home):
    config = make_config(home, "reward", {"kind": "reward"})
    result = train(
        config.model_copy(
            update={"train": config.train.model_copy(update={"steps": 12})}
        )
    )
    records = read_records(result)
    assert records[0]["loss"] == pytest.approx(np.log(2), rel=0.2)
    last = records[-1]
    assert last["eval_accuracy"] == 1
    assert last["eval_loss"] < 0.3
    rows = [
        json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()
    ]
    texts = [
        {"prompt": row["prompt"], "completion": row[s]}
        for row in rows
        for s in ("chosen", "rejected")
    ]
    scores = score_texts(result.folder, texts).reshape(-1, 2)
    assert (scores[:, 0] > scores[:, 1]).all()
    # Those of the held-out rows are what the run has seen of them.
    split, _ = config.task._split(len(rows), config.seed)  # type: ignore[attr-defined]
    margins = np.delete(scores[:, 0] - scores[:, 1], split)
    assert last["eval_margin"] == pytest.approx(margins.mean(), rel=1e-3)
    # It starts from the other run's parameters, all but the new head.
    base = train(
        make_config(home, "base", {"kind": "clm"}, train={"steps": 2})
    ).state.params
    first = train(
        make_config(
            home,
            "first",
            {"kind": "reward"},
            schedule={"kind": "constant", "warmup_steps": 0, "learning_rate": 1e-9},
        )
    )
    params = dict(first.state.params)
    assert np.abs(params.pop("heads")["score"]["kernel"]).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, base)
    adapted = make_config(home, "adapted", {"kind": "reward"}, adapter={"kind": "lora"})
    trained = flatten_names(set_up_run(adapted).trainable)
    names = {name.rpartition(".")[2] for name, spec in trained.items() if spec}
    assert names == {"lora_a", "lora_b", "kernel"}  # the last is the head's
    with pytest.raises(MaxlmError, match="no reward model"):
        score_texts(home / "base", texts)


@pytest.mark.more
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("dpo", {"kind": "lora"}), ("kto", None)],
)
def test_a_stored_reference_gives_the_losses_of_one_that_is_held(
    home, kind, adapter, tmp_path
):
    """With an adapter the one that is held is the base."""
    live_config = make_config(
        home, f"{kind}_held", {"kind": kind, "beta": 0.5}, adapter=adapter
    )
    precompute_reference_log_probs(live_config, tmp_path)
    stored = {"kind": kind, "beta": 0.5, "reference_log_probs": str(tmp_path)}
    stored_result = train(make_config(home, f"{kind}_stored", stored, adapter=adapter))
    assert not stored_result.state.frozen
    want = read_records(train(live_config))
    for here, there in zip(want, read_records(stored_result), strict=True):
        for name in ("loss", "eval_loss", "kl", "eval_accuracy", "margin", "grad_norm"):
            if name in here:
                assert there[name] == pytest.approx(here[name], rel=1e-5, abs=1e-6), (
                    name
                )
    sizes = dict(stored_result.setup.mesh.shape)
    both, alone = (
        plan_run(c, sizes=sizes).memory
        for c in (live_config, stored_result.setup.config)
    )
    assert both.frozen == (0 if adapter else both.parameters)
    assert alone.frozen == 0

    np.save(tmp_path / "files.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(
        MaxlmError, match=r"an array \[3, 2\], where the files .* need \[48, 2\]"
    ):
        train(make_config(home, f"{kind}_other", stored))


@pytest.mark.more
def test_a_reference_with_another_tokenizer_is_refused(home, tmp_path):
    parts = {"tokenizer": {"vocab_size": 290}, "train": {"steps": 1}}
    other = train(make_config(home, "other_words", {"kind": "clm"}, **parts))
    task = {"kind": "dpo", "reference": str(other.folder)}
    with pytest.raises(
        MaxlmError, match="'reference' was trained with another tokenizer"
    ):
        train(make_config(home, "mixed", task))
