"""Log-probabilities and entropies of a fused head, and both gradients, are in every
layout those of every logit in float64."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.parallel.cross_entropy import LogitsInputs
from maxlm.parallel.entropy import compute_log_probs_and_entropies
from maxlm.parallel.local import get_layout
from tests.models.building import QUICK
from tests.parallel.test_cross_entropy import CASES, B, S, operands, placed

COTANGENTS = np.random.default_rng(4).standard_normal((2, B, S))
LAYOUTS = ["one device", "vocabulary over two axes", "all, bias in shares"]
MORE = [name for name in CASES if name not in LAYOUTS]


@cache
def exact(cap, temperature):
    """Of :func:`operands` in float64: both, and the gradients in hidden, head and bias
    of Σ ``COTANGENTS`` · both."""
    hidden, head, bias, targets, _ = operands()

    def total(hidden, head, bias):
        logits = hidden @ head + bias
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        log_p = jax.nn.log_softmax(logits / temperature)
        chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        entropies = -(jnp.exp(log_p) * log_p).sum(-1)
        both = jnp.stack([chosen, entropies])
        return (COTANGENTS * both).sum(), both

    with jax.enable_x64(True):
        step = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True), compiler_options=QUICK)
        return jax.tree.map(np.asarray, step(hidden, head, bias))


def check(name, cap, temperature, mesh):
    case = CASES[name]

    def run(hidden, head, bias, targets):
        def total(hidden, head, bias):
            model = LogitsInputs(hidden, head, case.used, None, bias, cap)
            both = compute_log_probs_and_entropies(
                model, targets, temperature=temperature, chunk_tokens=5
            )
            spec = jax.typeof(both[0]).sharding.spec
            cotangents = [
                jax.sharding.reshard(jnp.float32(x), spec) for x in COTANGENTS
            ]
            terms = [(c * x).sum() for c, x in zip(cotangents, both, strict=True)]
            return sum(terms), both

        gradients, both = jax.grad(total, (0, 1, 2), has_aux=True)(hidden, head, bias)
        for gradient, value in zip(gradients, (hidden, head, bias), strict=True):
            assert get_layout(gradient) == get_layout(value)
        return gradients, both

    on = mesh(**case.mesh)
    with jax.set_mesh(on):
        hidden, head, bias, targets, _ = placed(on, case)
        gradients, both = jax.jit(run, compiler_options=QUICK)(
            hidden, head, bias, targets
        )
    true_gradients, true_both = exact(cap, temperature)
    for ours, true in zip(both, true_both, strict=True):
        np.testing.assert_allclose(ours, true, rtol=2e-6, atol=2e-5)
    for ours, true in zip(gradients, true_gradients, strict=True):
        np.testing.assert_allclose(ours, true, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_equal_the_formula(name, mesh):
    check(name, 3.0, 0.7, mesh)


@pytest.mark.more
@pytest.mark.parametrize("name", MORE)
def test_any_layout_will_do(name, mesh):
    check(name, None, 1.0, mesh)
