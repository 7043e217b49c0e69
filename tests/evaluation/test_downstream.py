"""While a run trains, tasks and losses by position are what its checkpoint gives
afterwards."""

import json

import jax
import numpy as np
import pytest

from maxlm.evaluation.curves import compute_gold_probability, compute_position_losses
from maxlm.evaluation.program import evaluate_model
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.scoring import Scorer
from tests.inference.conftest import CONFIGS, build
from tests.train import tiny

pytestmark = pytest.mark.heavy


def write_rows(folder) -> str:
    words = tiny.TEXT.split()
    random = np.random.default_rng(1)
    rows = [
        {
            "query": f"Question: {words[n]}\n",
            "choices": [*random.choice(words, 2)],
            "gold": n % 2,
        }
        for n in range(7)
    ]
    folder.mkdir()
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.more
def test_tasks_while_training_are_those_of_the_checkpoint(tmp_path):
    data = write_rows(tmp_path / "data")
    downstream = {
        "tasks": ["piqa"],
        "every": 2,
        "limit": 5,
        "data": data,
        "position_documents": 2,
    }
    text = tiny.write_text(tmp_path / "text")
    train = {"steps": 4, "downstream": downstream}
    config = tiny.write_config(
        tmp_path, text, train=train, mesh={"fsdp": 2, "data": -1}
    )
    run, _ = tiny.train(config)
    records = [r for r in tiny.read_metrics(run.folder) if "downstream/piqa/acc" in r]
    assert [record["step"] for record in records] == [2, 4]
    assert {f"eval_loss_at/{n}" for n in (1, 2, 4, 8, 16, 31)} <= records[0].keys()
    settings = ["max_length=32", "max_sequences=3", "prefill_tokens=48"]
    options = {"mesh": "fsdp=1", "data": tmp_path / "data", "limit": 5}
    results, folder = evaluate_model(str(run.folder), ["piqa"], settings, **options)
    assert folder == run.folder / "evaluations" / "step-000004"
    for metric in ("acc", "acc_norm"):
        value = results["results"]["piqa"][f"{metric},none"]
        assert records[-1][f"downstream/piqa/{metric}"] == value
    (path,) = folder.glob("samples_piqa_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    rights = []
    for sample in samples:
        weights = np.exp([float(answer[0]) for answer in sample["filtered_resps"]])
        rights.append(weights[int(sample["target"])] / weights.sum())
    probability = records[-1]["downstream/piqa/gold_probability"]
    assert probability == pytest.approx(np.mean(rights), abs=1e-4)
    assert (run.folder / "plots" / "downstream.png").stat().st_size > 10_000


def test_losses_by_position_are_means_over_documents(one_device_mesh):
    """Ranges end at powers of two, and the last one with the documents."""
    rows = np.random.default_rng(0).integers(0, 66, (3, 12)).tolist()
    losses = []
    with jax.set_mesh(one_device_mesh):
        llama = build(CONFIGS["llama"], one_device_mesh)
        engine = Engine(
            llama.model, llama.params, EngineConfig(max_sequences=2, max_length=16)
        )
        position_losses = compute_position_losses(Scorer(engine), rows)
        for row in rows:
            logprobs = np.asarray(jax.nn.log_softmax(llama.logits(row)), np.float64)
            losses.append(-logprobs[np.arange(11), row[1:]])
    mean = np.mean(losses, axis=0)
    expected = {1: mean[:1], 2: mean[1:2], 4: mean[2:4], 8: mean[4:8], 11: mean[8:]}
    assert position_losses.keys() == expected.keys()
    for end, values in expected.items():
        assert position_losses[end] == pytest.approx(values.mean(), abs=1e-4)


def test_only_multiple_choice_has_a_probability_of_the_right_choice():
    generated = [{"filtered_resps": ["text"], "target": "text"}]
    assert compute_gold_probability(generated) is None
    chosen = [{"filtered_resps": [(-1.0, False), (-2.0, True)], "target": 1}]
    assert compute_gold_probability(chosen) == pytest.approx(1 / (1 + np.e))
