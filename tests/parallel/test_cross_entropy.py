"""The fused head and loss on shards: sums, log-probabilities and gradients in every
layout are those of every logit in float64, with a bias, a cap and the z term or
without; gradients lie as what they are of does."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from maxlm.parallel.cross_entropy import (
    LogitsInputs,
    compute_fused_log_probs,
    fused_cross_entropy_loss,
)
from maxlm.parallel.local import Dims, get_layout, make_spec
from tests.models.building import QUICK

B, S, D, V = 4, 12, 5, 24
F, T, C = ("fsdp",), ("tensor",), ("context",)
CT, FT = ("context", "tensor"), ("fsdp", "tensor")


class LossCase(NamedTuple):
    """hidden [4, 12, 5], head [5, 24], bias [24]: the mesh axes of every dimension."""

    mesh: dict[str, int]
    hidden: Dims
    stored: Dims
    used: Dims
    bias: Dims


EIGHT = {"fsdp": 2, "context": 2, "tensor": 2}
CASES = {
    "one device": LossCase({}, ((), (), ()), ((), ()), ((), ()), ((),)),
    "batch": LossCase({"fsdp": 2}, (F, (), ()), ((), ()), ((), ()), ((),)),
    "vocabulary": LossCase({"tensor": 8}, ((), (), ()), ((), T), ((), T), (T,)),
    "vocabulary, whole bias": LossCase(
        {"tensor": 4}, ((), (), ()), ((), T), ((), T), ((),)
    ),
    "vocabulary over two axes": LossCase(
        {"fsdp": 2, "tensor": 2}, ((), (), ()), ((), FT), ((), FT), (FT,)
    ),
    "all, bias as in use": LossCase(EIGHT, (F, CT, ()), ((), (*T, *F)), ((), T), (T,)),
    "all, bias in shares": LossCase(
        EIGHT, (F, CT, ()), ((), (*T, *F)), ((), T), ((*T, *F),)
    ),
    "all, whole bias": LossCase(EIGHT, (F, CT, ()), ((), (*T, *F)), ((), T), ((),)),
    "all, bias elsewhere": LossCase(EIGHT, (F, CT, ()), ((), (*T, *F)), ((), T), (F,)),
    "shares without batch": LossCase(
        {"fsdp": 4}, ((), (), ()), ((), F), ((), ()), (F,)
    ),
}
# Bias, cap and z coefficient, every pair of values once: those of every layout, and
# others.
EVERY = (True, 3.0, 0.2)
OPTIONS = [(True, None, 0.0), (False, None, 0.2), (False, 3.0, 0.0)]


def operands():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, S, D))
    head = 2 * rng.standard_normal((D, V))
    targets = rng.integers(0, V, (B, S)).astype(np.int32)
    weights = np.where(rng.random((B, S)) < 0.3, 0, rng.random((B, S)))
    targets[weights == 0] = 0
    return hidden, head, rng.standard_normal(V), targets, weights


def placed(on: Mesh, case: LossCase):
    hidden, head, bias, targets, weights = operands()

    def put(array, dims):
        return jax.device_put(array, NamedSharding(on, make_spec(dims)))

    rows = case.hidden[:2]
    arrays = (np.float32(a) for a in (hidden, head, bias, weights))
    hidden, head, bias, weights = map(
        put, arrays, (case.hidden, case.stored, case.bias, rows)
    )
    return hidden, head, bias, put(targets, rows), weights


COTANGENT = np.random.default_rng(1).standard_normal((B, S))


@cache
def exact(biased, cap, z_loss):
    """Of :func:`operands` in float64, from [B, S, V]: both sums and the
    log-probabilities, and the gradients in hidden, head and bias of the loss and of Σ
    ``COTANGENT`` · log-probabilities."""
    hidden, head, bias, targets, weights = operands()

    def plain(hidden, head, bias):
        logits = hidden @ head + bias
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        log_probs = (
            jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            - normaliser
        )
        entropy = -jnp.sum(weights * log_probs)
        loss = entropy + z_loss * jnp.sum(weights * normaliser**2)
        return (loss, jnp.sum(log_probs * COTANGENT)), (loss, entropy, log_probs)

    def run(*operands):
        _, pull, values = jax.vjp(plain, *operands, has_aux=True)
        return values, [pull(jax.tree.map(jnp.float64, at)) for at in ((1, 0), (0, 1))]

    with jax.enable_x64(True):
        if not biased:
            bias = np.zeros(V)
        results = jax.jit(run, compiler_options=QUICK)(hidden, head, bias)
        return jax.tree.map(np.asarray, results)


def check(case, mesh, biased, cap, z_loss, whole=False):
    on = mesh(**case.mesh)

    def run(hidden, head, bias, targets, weights, whole):
        def both(hidden, head, bias):
            model = LogitsInputs(
                hidden, head, case.used, whole, bias if biased else None, cap
            )
            sums = fused_cross_entropy_loss(
                model, targets, weights, z_loss=z_loss, chunk_tokens=5
            )
            return (
                sums[0],
                compute_fused_log_probs(model, targets, chunk_tokens=5),
            ), sums[1]

        (loss, log_probs), pull, entropy = jax.vjp(
            both, hidden, head, bias, has_aux=True
        )
        cotangent = jax.sharding.reshard(
            jnp.float32(COTANGENT), jax.typeof(log_probs).sharding.spec
        )
        # A cotangent of the loss that is not 1.
        of_loss, of_own = (
            pull((jnp.float32(3), 0 * log_probs)),
            pull((0 * loss, cotangent)),
        )
        for gradient, value in zip(of_loss, (hidden, head, bias), strict=True):
            assert get_layout(gradient) == get_layout(value)
            assert gradient.dtype == jnp.float32
        return (loss, entropy, log_probs), ([g / 3 for g in of_loss], of_own)

    with jax.set_mesh(on):
        arrays = placed(on, case)
        in_use = NamedSharding(on, make_spec(case.used))
        whole = jax.device_put(arrays[1], in_use) if whole else None
        values, slopes = jax.jit(run, compiler_options=QUICK)(*arrays, whole)
    true_values, true_slopes = exact(biased, cap, z_loss)
    for computed, true in zip(values, true_values, strict=True):
        np.testing.assert_allclose(computed, true, rtol=2e-6, atol=2e-5)
    for computed, true in zip(slopes, true_slopes, strict=True):
        for gradient, want in zip(computed[: 2 + biased], true, strict=False):
            np.testing.assert_allclose(gradient, want, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize(("biased", "cap", "z_loss"), OPTIONS)
@pytest.mark.parametrize("name", ["one device", "all, bias in shares"])
def test_sums_and_gradients_equal_the_formula(name, biased, cap, z_loss, mesh):
    check(CASES[name], mesh, biased, cap, z_loss)


@pytest.mark.parametrize("name", CASES)
def test_any_layout_will_do(name, mesh):
    check(CASES[name], mesh, *EVERY)


def test_a_whole_head_is_used_and_its_share_gets_the_gradient(mesh):
    """ZeRO-2, in which the bias's share is gathered all the same."""
    check(CASES["all, bias in shares"], mesh, True, 3.0, 0.0, whole=True)


def test_no_device_holds_more_logits_than_a_chunk(mesh):
    """Of 240 tokens by 24 words, a bias and a cap included."""
    on = mesh()
    rng = np.random.default_rng(0)
    tokens, chunk = 240, 8
    with jax.set_mesh(on):
        hidden = jnp.asarray(rng.standard_normal((tokens, D)), jnp.float32)
        head = jnp.asarray(rng.standard_normal((D, V)), jnp.float32)
        targets = jnp.zeros(tokens, jnp.int32)
        weights = jnp.ones(tokens)

        def loss(hidden, head, bias):
            model = LogitsInputs(hidden, head, ((), ()), bias=bias, soft_cap=30.0)
            return fused_cross_entropy_loss(
                model, targets, weights, chunk_tokens=chunk
            )[0]

        step = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=QUICK)
        text = step.lower(hidden, head, jnp.zeros(V)).compile().as_text()
    assert f"f32[{chunk},{V}]" in text
    assert f"f32[{tokens},{V}]" not in text
    assert f"f32[{tokens // chunk},{chunk},{V}]" not in text
