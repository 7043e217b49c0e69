"""Promise: the filters keep exactly the tokens their definitions name, and draws follow the
probabilities of what is kept. Compared with a float64 filter written from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import load_config
from maxlm.inference.sampling import SamplingConfig, sample
from tests.errors import message

DRAWS = 4000


def reference(logits, temperature, top_k, top_p) -> np.ndarray:
    """float64 probabilities of one row after temperature, top-k and nucleus, token by token."""
    z = np.asarray(logits, np.float64) / temperature
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    order = order[: top_k or len(z)]
    weight = {i: np.exp(z[i] - z[order[0]]) for i in order}
    total, mass, kept = sum(weight.values()), 0.0, []
    for i in order:
        kept.append(i)
        mass += weight[i] / total
        if mass >= top_p and top_p < 1:
            break
    probability = np.zeros(len(z))
    for i in kept:
        probability[i] = weight[i]
    return probability / probability.sum()


@jax.jit
def _keys(seed):
    return jax.random.split(jax.random.key(seed), DRAWS)


def frequencies(logits, config, seed=0) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    drawn = jax.jit(sample, static_argnums=2)(rows, _keys(seed), config)
    assert drawn.shape == (DRAWS,)
    assert drawn.dtype == jnp.int32
    return np.bincount(np.asarray(drawn), minlength=len(logits)) / DRAWS


# Probabilities of about 0.31 0.06 0.19 0.02 0.19 0.12 0.11: two ties, unsorted.
LOGITS = np.log([0.31, 0.06, 0.19, 0.02, 0.19, 0.12, 0.11])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.5, 0, 1.0),
        (1.0, 2, 1.0),  # one of the tied pair: the lower id
        (1.0, 5, 1.0),
        (1.0, 99, 1.0),
        (1.0, 0, 0.55),  # 0.31 + 0.19 < 0.55: the whole pair
        (1.0, 0, 0.45),
        (1.0, 0, 0.95),
        (0.7, 4, 0.8),
        (3.0, 6, 0.6),
        (1.0, 3, 0.6),  # of the three kept by top_k, whose share of the whole is 0.69
    ],
)
def test_support_and_frequencies(temperature, top_k, top_p):
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = reference(LOGITS, temperature, top_k, top_p)
    found = frequencies(LOGITS, config)
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(expected))
    # 4.5 standard deviations of a binomial; the keys are fixed, so this never flickers.
    assert np.all(abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / DRAWS))


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}])
def test_of_equal_logits_the_lower_id_is_the_greedy_one(knobs):
    logits = jnp.asarray([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-1.0, -0.0, 0.0, -0.0]])
    keys = jax.random.split(jax.random.key(0), 3)
    assert sample(logits, keys, SamplingConfig(**knobs)).tolist() == [1, 0, 1]
    cold = SamplingConfig(temperature=1e-320, top_k=3)  # where no two are equal
    assert sample(jnp.arange(15.0).reshape(3, 5) ** 2, keys, cold).tolist() == [4, 4, 4]


def test_a_row_is_drawn_with_its_own_key_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 50)), jnp.float32)
    keys = jax.random.split(jax.random.key(5), 6)
    for config in (SamplingConfig(), SamplingConfig(top_k=20, top_p=0.9)):
        draw = jax.jit(sample, static_argnums=2)
        alone = [int(draw(logits[i : i + 1], keys[i : i + 1], config)[0]) for i in range(6)]
        assert draw(logits, keys, config).tolist() == alone


def test_bad_settings_are_refused_in_one_line():
    for bad in ("temperature=-0.1", "top_k=-1", "top_p=1.1", "max_new_tokens=0"):
        assert bad.partition("=")[0] in message(load_config, SamplingConfig, None, [bad])
    got = message(load_config, SamplingConfig, None, ["top_p=0"])
    assert got == "command line: top_p must be greater than 0, not 0"
