"""Promise: PPO with a divergence from the reference ends at the policy that the theory
names, π*(y) ∝ π_ref(y) · exp(reward(y) / kl_coef), and without one at the largest
reward."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.train.records import read_records
from tests.rl import policy_runs
from tests.train import tiny

pytestmark = [pytest.mark.more, pytest.mark.usefixtures("compiled_once")]

MODEL = tiny.settings(Path(), "")["model"]
PATTERN = r"[0-4a-m].*"
KL_COEF = 0.7
NUM_LAST = 12
"""Rollouts that are measured, 96 samples each."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return policy_runs.prepare(tmp_path_factory.mktemp("parts"))


def train_by_ppo(
    folder: Path, parts: dict[str, Any], kl_coef: float, num_rollouts: int
) -> dict[str, float]:
    """Trains a random model to answer with one token that matches; returns the means
    of what is logged of the last rollouts."""
    model = {**MODEL, "heads": {"value": 1}}
    path = policy_runs.write_config(
        folder,
        parts
        | {"model": model, "checkpoint": {"every_steps": 0}}
        | {"data": {"seq_len": 8, "batch_size": 48, "workers": 0}}
        | {"train": {"steps": num_rollouts * 4}},
        rollouts={"sampling": {"max_new_tokens": 1}},
        kind="ppo",
        num_samples=1,
        epochs=2,
        minibatches=2,
        kl_coef=kl_coef,
        whiten_advantages=False,
        rewards=[{"kind": "format", "pattern": PATTERN}],
        engine={"max_sequences": 96, "page_size": 4, "prefill_tokens": 512},
    )
    policy_runs.train(path)
    records = [*read_records(folder / "tiny/metrics.jsonl")]
    means: dict[str, float] = {}
    for name, per_rollout in (
        ("reward", 1),
        ("sequence_kl", 4),
        ("return_mean", 4),
        ("entropy", 4),
    ):
        values = [record[name] for record in records if name in record]
        if values:
            means[name] = float(np.mean(values[-NUM_LAST * per_rollout :]))
    return means


def test_ppo_ends_at_the_optimum_of_reward_and_divergence(tmp_path, parts):
    tokenizer = load_tokenizer(parts["tokenizer"]["path"])
    # A random model says everything about equally often.
    num_ids = int(MODEL["vocab_size"])
    is_right = [
        re.fullmatch(PATTERN, tokenizer.decode([token]).strip(), re.DOTALL) is not None
        for token in range(tokenizer.vocab_size)
    ]
    share = sum(is_right) / num_ids
    tilted = share * np.exp(1 / KL_COEF)
    optimum = tilted / (tilted + 1 - share)
    divergence = optimum * np.log(optimum / share)
    divergence += (1 - optimum) * np.log((1 - optimum) / (1 - share))

    near_reference = train_by_ppo(tmp_path / "near", parts, KL_COEF, 32)
    assert near_reference["reward"] == pytest.approx(optimum, abs=0.06)
    assert near_reference["sequence_kl"] == pytest.approx(divergence, abs=0.08)
    # What is to be expected then: kl_coef · log Σ π_ref · exp(reward / kl_coef).
    value = KL_COEF * np.log(tilted + 1 - share)
    assert near_reference["return_mean"] == pytest.approx(value, abs=0.04)

    unbound = train_by_ppo(tmp_path / "unbound", parts, 0.0, 20)
    assert unbound["reward"] > 0.9
    assert unbound["entropy"] < near_reference["entropy"] - 1
    assert "sequence_kl" not in unbound
