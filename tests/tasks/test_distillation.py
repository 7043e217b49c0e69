"""Distillation's loss is the formula of both models' logits in float64, over answers
alone, in any layout; a stored teacher's rows are those that are trained on."""

import json

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.params import bind, flatten_names
from maxlm.run.config import RunConfig
from maxlm.run.global_batch import make_global_batch
from maxlm.run.setup import set_up_run
from maxlm.sharding import bind_mesh
from maxlm.tasks import TaskModels
from maxlm.tasks.distillation import TextDistillationTask, write_stored_teacher
from tests.models.building import QUICK
from tests.tasks import row_cases
from tests.tasks.row_cases import (
    VOCAB,
    NumberTokenizer,
    draw_rows,
    make_batch,
    make_inputs,
)

SEQ, ROWS, WIDTH = 24, 4, 20
MODEL = {
    "vocab_size": VOCAB + 3,  # splits over two devices
    "num_layers": 2,
    "d_model": 16,
    "max_seq_len": SEQ,
    "remat": "none",
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    "mlp": {"d_ff": 28},
}
TEACHER = MODEL | {"num_layers": 1, "d_model": WIDTH, "logit_cap": 9.0}


def make_task(path, **settings):
    own = {"kind": "distill", "teacher": "teacher", "examples_per_row": 1} | settings
    return row_cases.make_task(path, draw_rows(5, ROWS), **own)


def compute_loss(task, batch, **mesh):
    """The loss's sums and gradient with random models on a mesh; and both models'
    logits."""
    settings = {"model": MODEL | {"heads": dict(task.required_heads)}, "task": task}
    settings |= {
        "compute_dtype": "float32",
        "data": {"seq_len": SEQ, "batch_size": ROWS},
    }
    config = RunConfig.model_validate(settings | {"mesh": {"fsdp": 1} | mesh})
    devices = jax.devices()[: int(np.prod(list(mesh.values()) or [1]))]
    runs = [
        set_up_run(
            config.model_copy(update={"model": model}), devices, frozen_sources={}
        )
        for model in (config.model, DecoderConfig.model_validate(TEACHER))
    ]
    params = [run.init_train_state().params for run in runs]
    spread = jax.tree.map(lambda p: 6 * p, params)
    own = runs[0]
    rows = [batch, task.batch_arrays(SEQ), range(ROWS), own.placed.compute, own.mesh]
    put = make_global_batch(*rows, (1, ROWS), own.token_order)
    put = {name: array[0] for name, array in put.items()}

    def loss(student, teacher, put):
        models = [
            bind(run.model, p) for run, p in zip(runs, (student, teacher), strict=True)
        ]
        frozen = {"teacher": models[1]} if task.teacher else {}
        return task.loss(TaskModels(models[0], frozen), put, jax.random.key(0))

    def states(student, teacher, put):
        found = []
        for run, p in zip(runs, (student, teacher), strict=True):
            model = bind(run.model, p)
            hidden = model(
                *(put[name] for name in ("tokens", "positions", "segment_ids"))
            )[0]
            found.append((hidden, model.logits(hidden)))
        return found

    run = bind_mesh(
        own.mesh,
        jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK),
    )
    (value, sums), gradient = run(*spread, put)
    sums = {name: float(x) for name, x in {"loss": value, **sums}.items()}
    if mesh:
        return sums, flatten_names(gradient), None
    both = bind_mesh(own.mesh, jax.jit(states, compiler_options=QUICK))(*spread, put)
    head = flatten_names(spread[0]).get("heads.features.kernel")
    both = jax.tree.map(lambda a: np.asarray(a, np.float64), both)
    return (
        sums,
        flatten_names(gradient),
        (both, None if head is None else np.float64(head)),
    )


def log_softmax(x):
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def test_the_loss_is_the_formulas_and_alike_in_every_layout(tmp_path):
    settings = {"divergence": "jsd", "beta": 0.3, "temperature": 1.7, "ce_weight": 0.2}
    settings |= {
        "features": WIDTH,
        "features_weight": 0.4,
        "chunk_tokens": 7,
        "z_loss": 1e-2,
    }
    task = make_task(tmp_path, **settings)
    batch = make_batch(task, SEQ, ROWS)
    sums, gradient, (((hidden, student), (wanted, teacher)), head) = compute_loss(
        task, batch
    )
    weights = batch["weights"]
    own = (log_softmax(a / 1.7) for a in (student, teacher))
    p, q = own
    mixture = np.log(0.7 * np.exp(p) + 0.3 * np.exp(q))
    kl = 0.3 * np.exp(q) * (q - mixture) + 0.7 * np.exp(p) * (p - mixture)
    divergence = 1.7**2 * (kl.sum(-1) * weights).sum()
    at = np.take_along_axis(log_softmax(student), batch["targets"][..., None], -1)[
        ..., 0
    ]
    entropy = -(at * weights).sum()
    norm = np.take_along_axis(student, batch["targets"][..., None], -1)[..., 0] - at
    features = (np.square(hidden @ head - wanted).mean(-1) * weights).sum()
    loss = (
        0.8 * divergence
        + 0.2 * (entropy + 1e-2 * (norm**2 * weights).sum())
        + 0.4 * features
    )
    want = {
        "divergence": divergence,
        "cross_entropy": entropy,
        "features": features,
        "loss": loss,
    }
    for name, value in (want | {"tokens": weights.sum()}).items():
        assert sums[name] == pytest.approx(value, rel=1e-5), name
    for mesh in (
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ):
        other, spread, _ = compute_loss(task, batch, **mesh)
        assert other == pytest.approx(sums, rel=2e-5)
        for name, value in gradient.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(
                spread[name], value, atol=3e-5 * scale, err_msg=name
            )


def test_a_prompt_or_padding_does_not_count(tmp_path):
    """What a prompt's targets are, and what a teacher would say of padding."""
    task = make_task(tmp_path, ce_weight=0.5)
    batch = make_batch(task, SEQ, ROWS)
    sums, gradient, _ = compute_loss(task, batch)
    targets = np.where(batch["weights"] == 0, 7, batch["targets"])
    again, same, _ = compute_loss(task, batch | {"targets": targets})
    assert again == sums
    assert jax.tree.all(jax.tree.map(np.array_equal, gradient, same))


def store(rows, task, k, temperature=1.0):
    """Rows with a random teacher's log-probabilities beside them, of all their answers'
    tokens."""
    random = np.random.default_rng(1)
    stored = []
    encoder = make_task_encoder(task.model_copy(update={"teacher": "any"}))
    for row in rows:
        found = encoder(row)
        targets = found["targets"][found["weights"] > 0]
        q = log_softmax(random.normal(size=(len(targets), MODEL["vocab_size"])) * 3)
        ids = np.argsort(-q)[:, :k]
        top = np.take_along_axis(q, ids, -1)
        rest = np.log1p(-np.minimum(np.exp(top).sum(-1, keepdims=True), 1 - 1e-12))
        own = ids, np.concatenate([top, rest], 1), targets
        stored.append(
            row | write_stored_teacher(*own) | {"teacher_temperature": temperature}
        )
    return stored


def make_task_encoder(task):
    return task.make_encoder(NumberTokenizer(), SEQ)


def test_a_stored_teacher_stands_beside_the_tokens_it_is_of(tmp_path):
    task = make_task(tmp_path, teacher=None, top_k=8)
    (row,) = store(draw_rows(0, 1), task, 8)
    found = make_task_encoder(task)(row)
    places = np.flatnonzero(found["weights"])
    ids = np.frombuffer(row["teacher_ids"], np.int32).reshape(-1, 8)
    np.testing.assert_array_equal(found["teacher_ids"][places], ids)
    log_probs = np.frombuffer(row["teacher_log_probs"], np.float32).reshape(-1, 9)
    np.testing.assert_array_equal(found["teacher_log_probs"][places], log_probs)


def test_a_stored_teachers_loss_is_the_formulas_in_every_layout(tmp_path):
    task = make_task(
        tmp_path, teacher=None, top_k=5, divergence="reverse_kl", chunk_tokens=7
    )
    encoder = make_task_encoder(task)
    found = [encoder(row) for row in store(draw_rows(2, ROWS), task, 5)]
    batch = {
        name: np.zeros((ROWS, *spec.shape), spec.dtype)
        for name, spec in task.batch_arrays(SEQ).items()
    }
    for i, own in enumerate(found):
        for name, array in batch.items():
            array[i, : len(own["tokens"])] = own[name]
    sums, gradient, (((_, student), _), _) = compute_loss(task, batch)
    p = np.exp(log_softmax(student))
    want = 0.0
    for i, j in np.argwhere(batch["weights"]):
        q = batch["teacher_log_probs"][i, j].astype(np.float64)
        own = p[i, j]
        top = own[batch["teacher_ids"][i, j]]
        classes = np.append(top, own.sum() - top.sum())
        want += (classes * (np.log(classes) - q)).sum()
    assert sums["divergence"] == pytest.approx(want, rel=1e-5)
    other, spread, _ = compute_loss(task, batch, fsdp=2, context=2, tensor=2)
    assert other == pytest.approx(sums, rel=2e-5)
    for name, value in gradient.items():
        np.testing.assert_allclose(
            spread[name], value, atol=3e-5 * np.abs(value).max(), err_msg=name
        )


def test_what_cannot_be_learnt_is_refused(tmp_path):
    task = make_task(tmp_path, teacher=None, top_k=5)
    rows = draw_rows(0, 2)
    row, other = store(rows, task, 5)
    for changed, settings, message in (
        (rows[0], {}, "no teacher's log-probabilities; maxlm tune store-logits"),
        (
            row,
            {"temperature": 2.0},
            "log-probabilities at temperature 1, not 2; set it to 1",
        ),
        (row, {"top_k": 6}, r"5 log-probabilities a token, task\.top_k=6"),
        (row | {"completion": other["completion"]}, {}, "are of other tokens"),
        (row, {"learn_prompt": True}, "are of other tokens"),
    ):
        encoder = make_task_encoder(task.model_copy(update=settings))
        with pytest.raises(MaxlmError, match=message):
            encoder(changed)
    file = tmp_path / "stored.jsonl"  # the size is all that is read of it
    file.write_text(json.dumps(rows[0] | {"teacher_vocab_size": MODEL["vocab_size"]}))
    task = task.model_copy(update={"files": (str(file),)})
    with pytest.raises(
        MaxlmError, match=rf"the teacher has {MODEL['vocab_size']} ids, .*={VOCAB}"
    ):
        task.batch_source(make_inputs(SEQ, ROWS))
    model = DecoderConfig.model_validate(MODEL)
    task = make_task(tmp_path, features=WIDTH)
    small = DecoderConfig.model_validate(TEACHER | {"vocab_size": 50})
    with pytest.raises(
        MaxlmError, match=r"^teacher: the teacher has 50 ids, model\.vocab_size="
    ):
        task.check_frozen_models(model, {"teacher": small})
    with pytest.raises(
        MaxlmError, match=r"task\.features: .*have 16 features; set it to 16"
    ):
        task.check_frozen_models(model, {"teacher": model})
    with pytest.raises(MaxlmError, match=r"heads.*features"):
        RunConfig.model_validate(
            {"model": MODEL, "task": task, "data": {"seq_len": SEQ}}
        )
    with pytest.raises(MaxlmError, match="have no hidden states"):
        make_task(tmp_path, teacher=None, features=WIDTH).check(SEQ, 9)
    with pytest.raises(ValueError, match="teacher"):
        TextDistillationTask.model_validate({})
