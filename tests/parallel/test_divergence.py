"""The divergence from a teacher on shards: sums and gradients in every layout are those
of every logit in float64; of a stored teacher, those of its likeliest tokens and one
class of the rest."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from maxlm.parallel.cross_entropy import LogitsInputs
from maxlm.parallel.divergence import (
    StoredTeacher,
    compute_top_log_probs,
    fused_divergence_loss,
)
from maxlm.parallel.local import get_layout, make_spec
from tests.models.building import QUICK
from tests.parallel.test_cross_entropy import CASES, B, LossCase, S, V, operands, placed

WIDTH, K = 7, 5  # of the teacher's hidden states; of its likeliest tokens
CAP, TEACHER_CAP, Z = 3.0, 4.0, 0.2


class Options(NamedTuple):
    beta: float
    temperature: float
    ce_weight: float


OPTIONS = [
    Options(beta, temperature, ce_weight)
    for beta, temperature, ce_weight in (
        (0.0, 1.0, 0.0),
        (0.0, 2.0, 0.3),
        (0.25, 2.0, 0.0),
        (0.75, 1.0, 0.3),
        (1.0, 0.5, 0.0),
        (1.0, 1.0, 1.0),
    )
]
LAYOUTS = ("one device", "vocabulary", "all, bias in shares", "shares without batch")


def teacher_operands():
    rng = np.random.default_rng(5)
    return rng.standard_normal((B, S, WIDTH)), 1.5 * rng.standard_normal((WIDTH, V))


def teacher_log_probs(temperature):
    hidden, head = teacher_operands()
    logits = TEACHER_CAP * np.tanh(hidden @ head / TEACHER_CAP) / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def top_classes(log_probs, k):
    """Ids and log-probabilities of the likeliest, and of the rest; each row in an order
    of its own."""
    order = np.random.default_rng(3).permuted(np.argsort(-log_probs)[..., :k], axis=-1)
    top = np.take_along_axis(log_probs, order, -1)
    rest = np.exp(log_probs).sum(-1, keepdims=True) - np.exp(top).sum(-1, keepdims=True)
    rest = np.log(np.maximum(rest, 0)) if k < V else np.full_like(rest, -np.inf)
    return order.astype(np.int32), np.concatenate([top, rest], -1)


@cache
def exact(options, k):
    """Sums and gradients of the loss in hidden, head and bias, by jax in float64."""
    hidden, head, bias, targets, weights = operands()
    q = teacher_log_probs(options.temperature)
    if k is not None:
        ids, q = top_classes(q, k)
        chosen = (ids[..., None] == np.arange(V)).any(-2)

    def loss(hidden, head, bias):
        logits = CAP * jnp.tanh((hidden @ head + bias) / CAP)
        p = jax.nn.log_softmax(logits / options.temperature)
        if k is not None:
            rest = jnp.log(jnp.where(chosen, 0, jnp.exp(p)).sum(-1, keepdims=True))
            p = jnp.concatenate([jnp.take_along_axis(p, ids, -1), rest], -1)
        beta = options.beta
        mixture = jnp.log((1 - beta) * jnp.exp(p) + beta * jnp.exp(q))
        kl = {
            0.0: jnp.exp(q) * (q - p),
            1.0: jnp.exp(p) * (p - q),
        }.get(
            beta,
            beta * jnp.exp(q) * (q - mixture) + (1 - beta) * jnp.exp(p) * (p - mixture),
        )
        divergence = options.temperature**2 * (kl.sum(-1) * weights).sum()
        norm = jax.nn.logsumexp(logits, -1)
        entropy = norm - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        entropy = (entropy * weights).sum()
        z = Z * (norm**2 * weights).sum()
        c = options.ce_weight
        return (1 - c) * divergence + c * (entropy + z), (divergence, entropy)

    with jax.enable_x64(True):
        run = jax.jit(
            jax.value_and_grad(loss, (0, 1, 2), has_aux=True), compiler_options=QUICK
        )
        (total, more), slopes = run(hidden, head, bias)
        return jax.tree.map(np.asarray, ((total, *more), slopes))


def check(case: LossCase, mesh, options, k=None):
    on = mesh(**case.mesh)
    with jax.set_mesh(on):
        hidden, head, bias, targets, weights = placed(on, case)

        def put(array, dims):
            return jax.device_put(array, NamedSharding(on, make_spec(dims)))

        layout = {"head_layout": case.used, "gathered_head": None}
        student = {**layout, "soft_cap": CAP}
        if k is None:
            states, kernel = (np.float32(a) for a in teacher_operands())
            teacher = {
                "hidden": put(states, case.hidden),
                "head": put(kernel, case.stored),
            }
            teacher |= {"bias": None, "soft_cap": TEACHER_CAP, **layout}
        else:
            ids, log_probs = top_classes(teacher_log_probs(options.temperature), k)
            # What stands where nothing is counted must not matter.
            ids[np.asarray(weights) == 0], log_probs[np.asarray(weights) == 0] = 0, 0
            rows = (*case.hidden[:2], ())
            teacher = StoredTeacher(put(ids, rows), put(np.float32(log_probs), rows))

        def loss(operands, teacher, targets, weights):
            model = LogitsInputs(
                hidden=operands[0], head=operands[1], bias=operands[2], **student
            )
            if k is None:
                teacher = LogitsInputs(**teacher)
            sums = fused_divergence_loss(
                model,
                teacher,
                targets,
                weights,
                **options._asdict(),
                z_loss=Z,
                chunk_tokens=5,
            )
            return 3 * sums[0], sums

        operands = hidden, head, bias
        arrays = (
            teacher if k is not None else {n: teacher[n] for n in ("hidden", "head")}
        )

        def run(operands, arrays, targets, weights):
            rest = arrays if k is not None else {**teacher, **arrays}
            return jax.value_and_grad(loss, has_aux=True)(
                operands, rest, targets, weights
            )

        (_, sums), slopes = jax.jit(run, compiler_options=QUICK)(
            operands, arrays, targets, weights
        )
        for gradient, value in zip(slopes, operands, strict=True):
            assert get_layout(gradient) == get_layout(value)
    true_sums, true_slopes = exact(options, None if k == V else k)
    for computed, true in zip(sums, true_sums, strict=True):
        np.testing.assert_allclose(computed, true, rtol=3e-6, atol=2e-5)
    for computed, true in zip(slopes, true_slopes, strict=True):
        np.testing.assert_allclose(computed / 3, true, rtol=3e-5, atol=5e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_live_teacher(options, mesh):
    check(CASES["one device"], mesh, options)


@pytest.mark.parametrize("k", [1, K, V - 1])
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[2], OPTIONS[4]])
def test_a_stored_teacher(options, k, mesh):
    check(CASES["one device"], mesh, options, k)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[4]])
def test_a_stored_teacher_of_all_tokens_is_the_live_one(options, mesh):
    check(CASES["one device"], mesh, options, V)


@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("name", LAYOUTS[1:])
def test_any_layout_will_do(name, k, mesh):
    check(CASES[name], mesh, OPTIONS[3], k)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_likeliest_tokens_and_the_rest_are_the_teachers(name, mesh):
    case = CASES[name]
    want = teacher_log_probs(2.0)
    on = mesh(**case.mesh)
    with jax.set_mesh(on):
        states, kernel = (
            jax.device_put(np.float32(a), NamedSharding(on, make_spec(dims)))
            for a, dims in zip(
                teacher_operands(), (case.hidden, case.stored), strict=True
            )
        )

        def run(hidden, head):
            model = LogitsInputs(hidden, head, case.used, soft_cap=TEACHER_CAP)
            return compute_top_log_probs(model, K, temperature=2.0, chunk_tokens=5)

        top = jax.jit(run, compiler_options=QUICK)(states, kernel)
    order = np.argsort(-want)[..., :K]
    np.testing.assert_array_equal(np.sort(top.ids), np.sort(order))
    log_probs = np.asarray(top.log_probs)
    np.testing.assert_allclose(
        log_probs[..., :K],
        np.take_along_axis(want, np.asarray(top.ids), -1),
        atol=3e-6,
    )
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-6)
