"""The fused head and loss on shards: sums and gradients in every layout are those of every logit in
float64, with a bias, a cap and the z term or without; gradients lie as what they are of does."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from maxlm.parallel.cross_entropy import compute_fused_log_probs, fused_cross_entropy_loss
from maxlm.parallel.local import Dims, get_layout, make_spec
from tests.models.building import QUICK

B, S, D, V = 4, 12, 5, 24
F, T, C = ("fsdp",), ("tensor",), ("context",)
CT, FT = ("context", "tensor"), ("fsdp", "tensor")


class Case(NamedTuple):
    """hidden [4, 12, 5], head [5, 24], bias [24]: the mesh axes of every dimension."""

    mesh: dict[str, int]
    hidden: Dims
    stored: Dims
    used: Dims
    bias: Dims


EIGHT = {"fsdp": 2, "context": 2, "tensor": 2}
CASES = {
    "one device": Case({}, ((), (), ()), ((), ()), ((), ()), ((),)),
    "batch": Case({"fsdp": 2}, (F, (), ()), ((), ()), ((), ()), ((),)),
    "vocabulary": Case({"tensor": 8}, ((), (), ()), ((), T), ((), T), (T,)),
    "vocabulary, whole bias": Case({"tensor": 4}, ((), (), ()), ((), T), ((), T), ((),)),
    "vocabulary over two axes": Case(
        {"fsdp": 2, "tensor": 2}, ((), (), ()), ((), FT), ((), FT), (FT,)
    ),
    "all, bias as in use": Case(EIGHT, (F, CT, ()), ((), (*T, *F)), ((), T), (T,)),
    "all, bias in shares": Case(EIGHT, (F, CT, ()), ((), (*T, *F)), ((), T), ((*T, *F),)),
    "all, whole bias": Case(EIGHT, (F, CT, ()), ((), (*T, *F)), ((), T), ((),)),
    "all, bias elsewhere": Case(EIGHT, (F, CT, ()), ((), (*T, *F)), ((), T), (F,)),
    "shares without batch": Case({"fsdp": 4}, ((), (), ()), ((), F), ((), ()), (F,)),
}
# Bias, cap and z coefficient, every pair of values once.
OPTIONS = [(True, None, 0.0), (True, 3.0, 0.2), (False, None, 0.2), (False, 3.0, 0.0)]


def operands():
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((B, S, D)), 2 * rng.standard_normal((D, V))
    targets = rng.integers(0, V, (B, S)).astype(np.int32)
    weights = np.where(rng.random((B, S)) < 0.3, 0, rng.random((B, S)))
    targets[weights == 0] = 0
    return hidden, head, rng.standard_normal(V), targets, weights


def plain(hidden, head, bias, targets, weights, cap, z_loss):
    """Both sums, from [B, S, V]."""
    logits = hidden @ head + bias
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    entropy = jnp.sum(weights * (normaliser - own))
    return entropy + z_loss * jnp.sum(weights * normaliser**2), entropy


def exact(biased, cap, z_loss):
    """Of :func:`operands` in float64: (sums, gradients of the loss in hidden, head and bias)."""
    hidden, head, bias, targets, weights = operands()
    with jax.enable_x64(True):
        of = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)
        bias = bias if biased else np.zeros(V)
        sums, gradients = of(hidden, head, bias, targets, weights, cap, z_loss)
        return jax.tree.map(np.asarray, (sums, gradients))


def placed(on: Mesh, case: Case):
    hidden, head, bias, targets, weights = operands()

    def put(array, dims):
        return jax.device_put(array, NamedSharding(on, make_spec(dims)))

    return (
        put(hidden.astype(np.float32), case.hidden),
        put(head.astype(np.float32), case.stored),
        put(bias.astype(np.float32), case.bias),
        put(targets, case.hidden[:2]),
        put(weights.astype(np.float32), case.hidden[:2]),
    )


@pytest.mark.parametrize(("biased", "cap", "z_loss"), OPTIONS)
@pytest.mark.parametrize("name", ["one device", "vocabulary", "all, bias in shares"])
def test_sums_and_gradients_equal_the_formula(name, biased, cap, z_loss, mesh):
    check(CASES[name], mesh, biased, cap, z_loss)


@pytest.mark.parametrize("name", CASES)
def test_any_layout_of_the_bias_will_do(name, mesh):
    check(CASES[name], mesh, True, 3.0, 0.2)


def check(case, mesh, biased, cap, z_loss):
    on = mesh(**case.mesh)

    def run(hidden, head, bias, targets, weights):
        def loss(hidden, head, bias):
            total, entropy = fused_cross_entropy_loss(
                *(hidden, head, targets, weights),
                used=case.used,
                bias=bias if biased else None,
                soft_cap=cap,
                z_loss=z_loss,
                chunk=5,
            )
            return 3 * total, entropy  # a cotangent that is not 1

        of = jax.value_and_grad(loss, (0, 1, 2) if biased else (0, 1), has_aux=True)
        (total, entropy), gradients = of(hidden, head, bias)
        for gradient, value in zip(gradients, (hidden, head, bias), strict=False):
            assert get_layout(gradient) == get_layout(value)
            assert gradient.dtype == jnp.float32
        return (total / 3, entropy), [gradient / 3 for gradient in gradients]

    with jax.set_mesh(on):
        sums, gradients = jax.jit(run, compiler_options=QUICK)(*placed(on, case))
    true_sums, true_gradients = exact(biased, cap, z_loss)
    np.testing.assert_allclose(sums, true_sums, rtol=2e-6)
    assert len(gradients) == 2 + biased
    for own, true in zip(gradients, true_gradients, strict=False):
        np.testing.assert_allclose(own, true, rtol=2e-5, atol=2e-6)


def test_a_whole_head_is_used_and_its_share_gets_the_gradient(mesh):
    """ZeRO-2, in which the bias's share is gathered all the same."""
    case = CASES["all, bias in shares"]
    on = mesh(**case.mesh)

    def run(hidden, head, whole, bias, targets, weights):
        def loss(head, bias):
            options = {"used": case.used, "whole": whole, "bias": bias, "soft_cap": 3.0}
            return fused_cross_entropy_loss(hidden, head, targets, weights, **options)[0]

        return jax.grad(loss, (0, 1))(head, bias)

    hidden, head, *rest = placed(on, case)
    whole = jax.device_put(
        operands()[1].astype(np.float32), NamedSharding(on, make_spec(case.used))
    )
    with jax.set_mesh(on):
        gradients = jax.jit(run, compiler_options=QUICK)(hidden, head, whole, *rest)
    for own, true in zip(gradients, exact(True, 3.0, 0.0)[1][1:], strict=True):
        np.testing.assert_allclose(own, true, rtol=2e-5, atol=2e-6)


def test_no_device_holds_more_logits_than_a_chunk(mesh):
    """Of 240 tokens by 24 words, a bias and a cap included."""
    on = mesh()
    rng = np.random.default_rng(0)
    tokens, chunk = 240, 8
    with jax.set_mesh(on):
        hidden = jnp.asarray(rng.standard_normal((tokens, D)), jnp.float32)
        head = jnp.asarray(rng.standard_normal((D, V)), jnp.float32)
        targets, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)

        def loss(hidden, head, bias):
            options = {"used": ((), ()), "bias": bias, "soft_cap": 30.0, "chunk": chunk}
            return fused_cross_entropy_loss(hidden, head, targets, weights, **options)[0]

        step = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=QUICK)
        text = step.lower(hidden, head, jnp.zeros(V)).compile().as_text()
    assert f"f32[{chunk},{V}]" in text
    assert f"f32[{tokens},{V}]" not in text
    assert f"f32[{tokens // chunk},{chunk},{V}]" not in text


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_and_their_gradients_are_those_of_every_logit(name, mesh):
    case, cap = CASES[name], 3.0
    hidden, head, bias, targets, _ = operands()
    cotangent = np.random.default_rng(1).standard_normal((B, S))

    def plain(hidden, head, bias):
        logits = cap * jnp.tanh((hidden @ head + bias) / cap)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return jnp.sum(own * cotangent), own

    with jax.enable_x64(True):
        run = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)
        (_, want), slopes = jax.tree.map(np.asarray, run(hidden, head, bias))
    grid = mesh(**case.mesh)
    dims = (case.hidden, case.stored, case.bias)
    arrays = [
        jax.device_put(np.float32(a), NamedSharding(grid, make_spec(d)))
        for a, d in zip((hidden, head, bias), dims, strict=True)
    ]

    def fused(hidden, head, bias):
        how = {"used": case.used, "soft_cap": cap, "chunk": 7}
        own = compute_fused_log_probs(hidden, head, targets, bias=bias, **how)
        spec = jax.typeof(own).sharding.spec
        return jnp.sum(own * jax.sharding.reshard(jnp.float32(cotangent), spec)), own

    with jax.set_mesh(grid):
        (_, got), found = jax.jit(jax.value_and_grad(fused, (0, 1, 2), has_aux=True))(*arrays)
    np.testing.assert_allclose(got, want, atol=2e-5)
    for ours, theirs in zip(found, slopes, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)
