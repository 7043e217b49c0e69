"""Distillation's loss is the formula of both models' logits in float64, over answers
alone, in any layout; a stored teacher's rows are those that are trained on."""

import json
from collections.abc import Callable
from functools import cache
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.params import bind, flatten_names
from maxlm.run.config import RunConfig
from maxlm.run.global_batch import make_global_batch
from maxlm.run.setup import RunSetup, set_up_run
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

pytestmark = pytest.mark.heavy

SEQ = 24
ROWS = 4
WIDTH = 20
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
    usual = {"kind": "distill", "teacher": "teacher", "examples_per_row": 1} | settings
    return row_cases.make_task(path, draw_rows(5, ROWS), **usual)


class Outputs(NamedTuple):
    """Both models' outputs, in float64."""

    student_hidden: np.ndarray
    student_logits: np.ndarray
    teacher_hidden: np.ndarray
    teacher_logits: np.ndarray
    feature_head: np.ndarray | None
    """The student's map to the teacher's features."""


class Programs(NamedTuple):
    """A student and a teacher on a mesh, with random parameters."""

    student_run: RunSetup
    params: tuple[Any, Any]
    """The student's and the teacher's."""
    step: Callable[..., Any]
    forward: Callable[..., Any]

    def put(self, task, batch):
        arrays = make_global_batch(
            batch,
            task.batch_arrays(SEQ),
            range(ROWS),
            self.student_run.placed.compute,
            self.student_run.mesh,
            (1, ROWS),
            self.student_run.token_order,
        )
        return {name: array[0] for name, array in arrays.items()}


def compute_loss(task, batch, mesh_sizes=MappingProxyType({})):
    """The loss's sums and gradient on a mesh, by default of one device."""
    programs = find_programs(task, mesh_sizes)
    (value, sums), gradient = programs.step(*programs.params, programs.put(task, batch))
    sums = {name: float(x) for name, x in {"loss": value, **sums}.items()}
    return sums, flatten_names(gradient)


def compute_outputs(task, batch):
    """Both models' outputs, on one device."""
    programs = find_programs(task)
    arrays = programs.forward(*programs.params, programs.put(task, batch))
    head = flatten_names(programs.params[0]).get("heads.features.kernel")
    return Outputs(
        *(np.asarray(array, np.float64) for array in arrays),
        feature_head=None if head is None else np.float64(head),
    )


def find_programs(task, mesh_sizes=MappingProxyType({})):
    settings = task.model_dump_json(exclude={"files"})
    return build_programs(type(task), settings, tuple(mesh_sizes.items()))


@cache
def build_programs(
    kind: Any, settings: str, mesh_sizes: tuple[tuple[str, int], ...]
) -> Programs:
    """Compiled once for all files of a task, which its batches alone depend on."""
    task = kind.model_validate_json(settings)
    mesh = dict(mesh_sizes)
    config = RunConfig.model_validate(
        {
            "model": MODEL | {"heads": dict(task.required_heads)},
            "task": task,
            "compute_dtype": "float32",
            "data": {"seq_len": SEQ, "batch_size": ROWS},
            "mesh": {"fsdp": 1} | mesh,
        }
    )
    devices = jax.devices()[: prod(mesh.values())]

    def set_up(model):
        run = config.model_copy(update={"model": model})
        return set_up_run(run, devices, frozen_sources={})

    student_run = set_up(config.model)
    teacher_run = set_up(DecoderConfig.model_validate(TEACHER))
    params = [run.init_train_state().params for run in (student_run, teacher_run)]
    # Larger parameters, for distributions that differ.
    student_params, teacher_params = jax.tree.map(lambda p: 6 * p, params)

    def loss(student_params, teacher_params, put):
        student = bind(student_run.model, student_params)
        teacher = bind(teacher_run.model, teacher_params)
        frozen = {"teacher": teacher} if task.teacher else {}
        return task.loss(TaskModels(student, frozen), put, jax.random.key(0))

    def run_models(student_params, teacher_params, put):
        inputs = (put["tokens"], put["positions"], put["segment_ids"])
        student = bind(student_run.model, student_params)
        teacher = bind(teacher_run.model, teacher_params)
        student_hidden, _ = student(*inputs)
        teacher_hidden, _ = teacher(*inputs)
        return (
            student_hidden,
            student.logits(student_hidden),
            teacher_hidden,
            teacher.logits(teacher_hidden),
        )

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    forward = jax.jit(run_models, compiler_options=QUICK)
    return Programs(
        student_run,
        (student_params, teacher_params),
        bind_mesh(student_run.mesh, step),
        bind_mesh(student_run.mesh, forward),
    )


def log_softmax(x):
    largest = x.max(-1, keepdims=True)
    total = np.exp(x - largest).sum(-1, keepdims=True)
    return x - np.log(total) - largest


# All that the loss has.
SETTINGS = {
    "divergence": "jsd",
    "beta": 0.3,
    "temperature": 1.7,
    "ce_weight": 0.2,
    "features": WIDTH,
    "features_weight": 0.4,
    "chunk_tokens": 7,
    "z_loss": 1e-2,
}
RING = {"fsdp": 2, "context": 2, "tensor": 2}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


def test_the_loss_is_the_formulas(tmp_path):
    task = make_task(tmp_path, **SETTINGS)
    batch = make_batch(task, SEQ, ROWS)
    sums, _ = compute_loss(task, batch)
    outputs = compute_outputs(task, batch)
    weights = batch["weights"]
    student = outputs.student_logits
    p = log_softmax(student / 1.7)
    q = log_softmax(outputs.teacher_logits / 1.7)
    mixture = np.log(0.7 * np.exp(p) + 0.3 * np.exp(q))
    kl = 0.3 * np.exp(q) * (q - mixture) + 0.7 * np.exp(p) * (p - mixture)
    divergence = 1.7**2 * (kl.sum(-1) * weights).sum()
    targets = batch["targets"][..., None]
    log_probs = np.take_along_axis(log_softmax(student), targets, -1)[..., 0]
    entropy = -(log_probs * weights).sum()
    # The log-normaliser.
    norm = np.take_along_axis(student, targets, -1)[..., 0] - log_probs
    z_loss = 1e-2 * (norm**2 * weights).sum()
    predicted = outputs.student_hidden @ outputs.feature_head
    errors = np.square(predicted - outputs.teacher_hidden).mean(-1)
    features = (errors * weights).sum()
    loss = 0.8 * divergence + 0.2 * (entropy + z_loss) + 0.4 * features
    want = {
        "divergence": divergence,
        "cross_entropy": entropy,
        "features": features,
        "loss": loss,
    }
    for name, value in (want | {"tokens": weights.sum()}).items():
        assert sums[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.more
@pytest.mark.parametrize("mesh", [RING, CUBE])
def test_the_loss_is_alike_in_every_layout(mesh, tmp_path):
    task = make_task(tmp_path, **SETTINGS)
    check_layout(task, make_batch(task, SEQ, ROWS), mesh)


def check_layout(task, batch, mesh_sizes):
    """A mesh's loss and gradient are those of one device."""
    sums, gradient = compute_loss(task, batch)
    other, spread = compute_loss(task, batch, mesh_sizes)
    assert other == pytest.approx(sums, rel=2e-5)
    for name, value in gradient.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(spread[name], value, atol=3e-5 * scale, err_msg=name)


def test_a_prompt_or_padding_does_not_count(tmp_path):
    """What a prompt's targets are, and what a teacher would say of padding."""
    task = make_task(tmp_path, **SETTINGS)
    batch = make_batch(task, SEQ, ROWS)
    sums, gradient = compute_loss(task, batch)
    targets = np.where(batch["weights"] == 0, 7, batch["targets"])
    again, same = compute_loss(task, batch | {"targets": targets})
    assert again == sums
    assert jax.tree.all(jax.tree.map(np.array_equal, gradient, same))


def store(rows, task, k, temperature=1.0):
    """Rows with a random teacher's log-probabilities beside them, of all their answers'
    tokens."""
    random = np.random.default_rng(1)
    stored = []
    encoder = make_task_encoder(task.model_copy(update={"teacher": "any"}))
    for row in rows:
        arrays = encoder(row)
        targets = arrays["targets"][arrays["weights"] > 0]
        q = log_softmax(random.normal(size=(len(targets), MODEL["vocab_size"])) * 3)
        ids = np.argsort(-q)[:, :k]
        top = np.take_along_axis(q, ids, -1)
        rest = np.log1p(-np.minimum(np.exp(top).sum(-1, keepdims=True), 1 - 1e-12))
        log_probs = np.concatenate([top, rest], 1)
        columns = write_stored_teacher(ids, log_probs, targets)
        stored.append(row | columns | {"teacher_temperature": temperature})
    return stored


def make_task_encoder(task):
    return task.make_encoder(NumberTokenizer(), SEQ)


def test_a_stored_teacher_stands_beside_the_tokens_it_is_of(tmp_path):
    task = make_task(tmp_path, teacher=None, top_k=8)
    (row,) = store(draw_rows(0, 1), task, 8)
    arrays = make_task_encoder(task)(row)
    places = np.flatnonzero(arrays["weights"])
    ids = np.frombuffer(row["teacher_ids"], np.int32).reshape(-1, 8)
    np.testing.assert_array_equal(arrays["teacher_ids"][places], ids)
    log_probs = np.frombuffer(row["teacher_log_probs"], np.float32).reshape(-1, 9)
    np.testing.assert_array_equal(arrays["teacher_log_probs"][places], log_probs)


@pytest.mark.parametrize("mesh", [{}, pytest.param(RING, marks=pytest.mark.more)])
def test_a_stored_teachers_loss_is_the_formulas_in_every_layout(mesh, tmp_path):
    task = make_task(
        tmp_path, teacher=None, top_k=5, divergence="reverse_kl", chunk_tokens=7
    )
    encoder = make_task_encoder(task)
    examples = [encoder(row) for row in store(draw_rows(2, ROWS), task, 5)]
    batch = {
        name: np.zeros((ROWS, *spec.shape), spec.dtype)
        for name, spec in task.batch_arrays(SEQ).items()
    }
    for i, example in enumerate(examples):
        for name, array in batch.items():
            array[i, : len(example["tokens"])] = example[name]
    if mesh:
        check_layout(task, batch, mesh)
        return
    sums, _ = compute_loss(task, batch)
    outputs = compute_outputs(task, batch)
    p = np.exp(log_softmax(outputs.student_logits))
    want = 0.0
    for i, j in np.argwhere(batch["weights"]):
        q = batch["teacher_log_probs"][i, j].astype(np.float64)
        probabilities = p[i, j]
        top = probabilities[batch["teacher_ids"][i, j]]
        classes = np.append(top, probabilities.sum() - top.sum())
        want += (classes * (np.log(classes) - q)).sum()
    assert sums["divergence"] == pytest.approx(want, rel=1e-5)


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
