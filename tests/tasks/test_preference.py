"""Preference tasks compute their papers' formulas, however their rows are packed,
accumulated and laid out; what they cannot learn from is refused by file and row.
tests/parity holds them to TRL."""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.aux import Aux
from maxlm.models.params import bind, flatten_names
from maxlm.run.config import RunConfig
from maxlm.run.setup import open_training_batches, set_up_run
from maxlm.sharding import MeshConfig, ShardingConfig, bind_mesh
from maxlm.tasks.preference import SequenceLogProbs
from maxlm.tasks.reference_free import OrpoTask
from tests.models import building
from tests.tasks.row_cases import (
    EOS,
    PREFERENCE_CASES,
    VOCAB,
    compute_loss_and_gradient,
    draw_rows,
    make_batch,
    make_inputs,
    make_task,
)

pytestmark = pytest.mark.heavy

CONFIG = building.LLAMA_GQA.model_copy(
    update={"vocab_size": VOCAB, "max_seq_len": 96, "heads": {"score": 1}}
)
SEQ = 42
ROWS = 6
every = pytest.mark.parametrize("name", PREFERENCE_CASES)
# Forms of a task differ in a line of the loss, and every one's is compared with its
# formula: these are one against a reference, one by rows and one without either.
FEW = ("dpo_sigmoid", "kto", "orpo")


@pytest.fixture(scope="module")
def models(one_device_mesh):
    """A model, its mesh, its parameters and those of a reference."""
    sizes = dict(one_device_mesh.shape)
    rules = ShardingConfig().compute.for_mesh(sizes)
    model = CONFIG.build(rules=rules, dtype=np.float32)
    where = building.storage(CONFIG, one_device_mesh)
    drawn = []
    for seed in (0, 1):
        values = building.random_params(CONFIG, one_device_mesh, seed)
        drawn.append(
            building.on_devices(jax.tree.map(lambda x: 0.7 * x, values), where)
        )
    return model, one_device_mesh, *drawn


def sequence(row: dict[str, Any], answer: str, prompt: str | None = None) -> list[int]:
    texts = (row["prompt"] if prompt is None else prompt, row[answer])
    return [int(word) for text in texts for word in text.split()] + [EOS]


@jax.jit(static_argnums=0)
def run_model(
    model: Any, params: Any, tokens: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Logits, and scores of the head."""
    bound = bind(model, params)
    hidden, _ = bound(tokens, np.arange(SEQ, dtype=np.int32)[None])
    return bound.logits(hidden), bound.apply_head("score", hidden)


class Answers:
    """Float64 log-probabilities of answers, one sequence at a time, by the model's own
    logits."""

    def __init__(self, model: Any, mesh: Any, params: Any):
        self._run = bind_mesh(mesh, partial(run_model, model))
        self._params = params

    def _compute(self, ids: list[int]) -> list[np.ndarray]:
        tokens = np.zeros((1, SEQ), np.int32)
        tokens[0, : len(ids)] = ids
        arrays = self._run(self._params, tokens)
        return [np.asarray(array[0, : len(ids)], np.float64) for array in arrays]

    def log_probs(self, ids: list[int], num_prompt: int) -> np.ndarray:
        logits, _ = self._compute(ids)
        logits = logits[:-1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        of_targets = log_probs[np.arange(len(ids) - 1), ids[1:]]
        return of_targets[max(num_prompt - 1, 0) :]

    def score(self, ids: list[int]) -> float:
        _, scores = self._compute(ids)
        return scores[-1, 0]


def compute_formula(
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    trained: Answers,
    other: Answers,
) -> Any:
    """The mean loss, written out."""
    kind = settings["kind"]
    beta = settings.get("beta", 0.1)
    form = settings.get("loss_type", "sigmoid")
    eps = settings.get("label_smoothing", 0.0)
    sizes = [len(row["prompt"].split()) for row in rows]

    def log_probs(model: Answers, answer: str) -> list[np.ndarray]:
        return [
            model.log_probs(sequence(r, answer), n)
            for r, n in zip(rows, sizes, strict=True)
        ]

    def log_sigmoid(x):
        return -np.logaddexp(0, -np.asarray(x))

    if kind == "reward":
        chosen, rejected = (
            np.array([trained.score(sequence(row, side)) for row in rows])
            for side in ("chosen", "rejected")
        )
        loss = -log_sigmoid(chosen - rejected - [row["margin"] for row in rows])
        return np.mean(
            loss + settings.get("center_rewards", 0) * (chosen + rejected) ** 2
        )
    if kind == "kto":
        kl = []
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            ids = sequence(rows[i - 1], "completion", row["prompt"])
            kl.append(
                sum(trained.log_probs(ids, size)) - sum(other.log_probs(ids, size))
            )
        z = max(np.mean(kl), 0)
        pairs = zip(
            log_probs(trained, "completion"),
            log_probs(other, "completion"),
            strict=True,
        )
        losses = []
        for row, (ours, theirs) in zip(rows, pairs, strict=True):
            sign = 1 if row["label"] else -1
            weight = "desirable_weight" if row["label"] else "undesirable_weight"
            value = 1 / (1 + np.exp(-sign * beta * (ours.sum() - theirs.sum() - z)))
            losses.append(settings[weight] * (1 - value))
        return np.mean(losses)
    sides = "chosen", "rejected"
    mean_of = form in ("ipo", "simpo") or kind == "orpo"
    reduce = np.mean if mean_of else np.sum
    chosen, rejected = (
        np.array([reduce(x) for x in log_probs(trained, side)]) for side in sides
    )
    if kind == "dpo":
        base = [np.array([reduce(x) for x in log_probs(other, side)]) for side in sides]
        chosen, rejected = chosen - base[0], rejected - base[1]
    gap = chosen - rejected
    if kind == "orpo":
        odds = [x - np.log1p(-np.exp(x)) for x in (chosen, rejected)]
        whole = np.concatenate(
            [trained.log_probs(sequence(row, "chosen"), 1) for row in rows]
        )
        return -whole.mean() - np.mean(beta * log_sigmoid(odds[0] - odds[1]))
    if form == "simpo":
        gap -= settings["gamma"] / beta
    h = beta * gap
    if form == "hinge":
        loss = np.maximum(0, 1 - h)
    elif form == "ipo":
        loss = (gap - 1 / (2 * beta)) ** 2
    elif form == "robust":
        loss = -((1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h)) / (1 - 2 * eps)
    else:
        loss = -(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h)
    if kind == "cpo":
        chosen_mean = np.concatenate(log_probs(trained, "chosen")).mean()
        loss = loss - settings.get("alpha", 1.0) * chosen_mean
    return np.mean(loss)


@every
@pytest.mark.parametrize("seed", [0, 3])
def test_a_loss_is_its_formula(name, seed, models, tmp_path):
    settings = PREFERENCE_CASES[name]
    rows = draw_rows(seed, ROWS)
    task = make_task(tmp_path, rows, **settings)
    loss, sums, _ = compute_loss_and_gradient(task, models, make_batch(task, SEQ, ROWS))
    model, mesh, *params = models
    want = compute_formula(
        settings, rows, *(Answers(model, mesh, values) for values in params)
    )
    assert loss == pytest.approx(want, rel=2e-5)
    assert sums["tokens"] == 1
    if settings["kind"] == "kto":
        assert (sums["kl"] > 0) == (seed == 3)  # both sides of the clamp are seen


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW else pytest.mark.more)
        for name in PREFERENCE_CASES
    ],
)
def test_packed_rows_and_micro_batches_change_nothing(name, models, tmp_path):
    settings = PREFERENCE_CASES[name]
    rows = draw_rows(4, ROWS)
    task = make_task(tmp_path, rows, **settings)
    want, sums, gradient = compute_loss_and_gradient(
        task, models, make_batch(task, SEQ, ROWS)
    )
    packed = task.model_copy(update={"examples_per_row": 3})
    cases = [(task, SEQ, ROWS, 3), (packed, 2 * SEQ, 4, 2)]
    for variant, seq_len, count, parts in cases:
        batch = make_batch(variant, seq_len, count)
        if variant is packed:
            # Some rows hold several, one nothing.
            assert batch["segment_ids"].max() > task.sequences_per_example
            assert not batch["segment_ids"].any(-1).all()
        result = compute_loss_and_gradient(variant, models, batch, parts)
        assert result[0] == pytest.approx(want, rel=1e-6)
        for key, value in sums.items():
            if parts == 1 or settings["kind"] != "kto":
                assert result[1][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
        flat = flatten_names(result[2])
        for key, value in flatten_names(gradient).items():
            scale = float(abs(value).max()) + 1e-3
            np.testing.assert_allclose(
                flat[key], value, atol=3e-6 * scale, rtol=0, err_msg=key
            )


def test_mismatched_completions_have_room_in_packed_rows(tmp_path):
    sizes = [3, 20] * 6
    rows = [
        {"prompt": "5 6", "completion": "7 " * size, "label": True} for size in sizes
    ]
    task = make_task(tmp_path, rows, kind="kto", examples_per_row=4)
    batch = make_batch(task, 40, len(rows))
    learnt = batch["kl_weights"].sum()
    assert learnt == batch["weights"].sum() == sum(sizes) + len(rows)


CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
RING = {"fsdp": 2, "context": 2}
STAGES = {"stage": 2}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("reward", RING, marks=pytest.mark.more),
        pytest.param("dpo_sigmoid", RING, marks=pytest.mark.more),
        pytest.param("kto", CUBE, marks=pytest.mark.more),
        pytest.param("orpo", STAGES, marks=pytest.mark.more),
    ],
)
def test_a_mesh_trains_as_one_device_does(name, layout, tmp_path):
    """Packed, with the reference on the same mesh."""
    task = make_task(
        tmp_path, draw_rows(5, 24), **PREFERENCE_CASES[name], examples_per_row=2
    )
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    model = {"vocab_size": VOCAB + 1, "num_layers": 2, "d_model": 24, "max_seq_len": 96}
    model |= {"remat": "none"}
    config = RunConfig.model_validate(
        {
            "compute_dtype": "float32",
            "model": {
                **model,
                "attention": attention,
                "mlp": {"d_ff": 40},
                "heads": {"score": 1},
            },
            "task": task.model_dump(),
            "data": {"seq_len": 64, "batch_size": 8, "workers": 0},
            "sharding": {"max_unsharded": 1},
            "train": {"steps": 2, "micro_batches": 2},
            "schedule": {"learning_rate": 1e-2, "warmup_steps": 0, "kind": "constant"},
        }
    )
    source = task.batch_source(make_inputs(64, 8))
    results = []
    for sizes in ({}, layout):
        count = int(np.prod([*sizes.values(), 1]))
        mesh = MeshConfig(**{"fsdp": 1} | sizes)
        setup = set_up_run(
            config.model_copy(update={"mesh": mesh}), jax.devices()[:count]
        )
        state = setup.init_train_state()
        frozen = {
            key: jax.tree.map(lambda p: 1.3 * p, state.params)
            for key in setup.frozen_sources
        }
        state = state.__class__(**{**vars(state), "frozen": frozen})
        step = setup.jit_train_step()
        records = []
        with open_training_batches(setup, source, 0) as batches:
            for batch in batches:
                state, metrics = step(state, batch)
                records.append({key: float(value) for key, value in metrics.items()})
        results.append((records, jax.device_get(flatten_names(state.params))))
    (records, params), (spread_records, spread) = results
    for here, there in zip(records, spread_records, strict=True):
        for key, value in here.items():
            assert there[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for key, value in params.items():
        np.testing.assert_allclose(spread[key], value, atol=2e-4, err_msg=key)


ROW = {
    "prompt": "3 4",
    "chosen": "5 6",
    "rejected": "7",
    "completion": "5",
    "label": True,
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dpo", {"rejected": "5 6"}, "chosen equals rejected"),
        ("orpo", {"chosen": " "}, "an empty completion"),
        ("kto", {"label": "good"}, "label is 'good'"),
        ("kto", {"completion": ""}, "an empty completion"),
        ("kto", {"label": None}, "label is null"),
        ("reward", {"margin": "large"}, "margin is 'large'"),
        ("cpo", {"prompt": None}, "prompt is null"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_number(kind, change, message, tmp_path):
    task = make_task(tmp_path, [ROW, ROW, ROW | change], kind=kind)
    with pytest.raises(MaxlmError) as caught:
        task.batch_source(make_inputs(16, 2))
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl: row 2: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "dpo", "loss_type": "ipo", "label_smoothing": 0.1},
            "label_smoothing=0.1 with",
        ),
        (
            {"kind": "dpo", "loss_type": "robust", "label_smoothing": 0.5},
            "less than 0.5",
        ),
        ({"kind": "kto", "examples_per_row": None}, "should be a valid integer"),
        ({"kind": "reward"}, r"reads the heads \{'score': 1\}"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, tmp_path):
    run = {
        "model": json.loads(building.GPT2.model_dump_json()),
        "data": {"seq_len": 16},
    }
    with pytest.raises((MaxlmError, ValueError), match=message):
        RunConfig.model_validate(run | {"task": settings})


def test_one_row_is_no_file_for_kto(tmp_path):
    with pytest.raises(
        MaxlmError, match="one row, where each is compared with another's"
    ):
        make_task(tmp_path, [ROW], kind="kto").batch_source(make_inputs(16, 2))


def test_log_odds_are_finite_where_a_probability_is_near_one():
    task = OrpoTask(beta=1.0)
    batch = {"segment_ids": np.array([[1, 2]])}
    batch["nll_weights"] = np.zeros((1, 2), np.float32)

    def loss(chosen, rejected):
        sums = jnp.stack([chosen, rejected])[None, None]
        answers = SequenceLogProbs(jnp.zeros((1, 2)), sums, jnp.ones_like(sums), Aux())
        return task.compute_pair_losses(answers, batch)[0].sum()

    def log_odds(x):
        return x - np.log(-np.expm1(np.minimum(x.astype(np.float64), -1e-7)))

    x = np.array([-1e-8, -1e-6, -0.5, -0.7, -3.0, -200.0], np.float32)
    chosen, rejected = (grid.ravel() for grid in np.meshgrid(x, x))
    value, slopes = jax.vmap(jax.value_and_grad(loss, (0, 1)))(chosen, rejected)
    exact = np.logaddexp(0, log_odds(rejected) - log_odds(chosen))
    np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-30)
    assert np.isfinite(slopes).all()
