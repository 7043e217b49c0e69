"""Decoders compute what the papers say: hidden states, logits, loss and gradients equal
those of a float64 NumPy implementation, packed rows and padding included."""

from functools import cache

import jax
import numpy as np
import pytest

from maxlm.models.params import flatten_names
from tests.models import building, reference
from tests.models.building import CONFIGS, PATTERN, POSITIONS, SEGMENTS


def reference_loss(config, params, batch):
    total = 0.0
    for row in range(len(batch["tokens"])):
        tokens, positions, segments, targets, weights = (
            batch[k][row]
            for k in ("tokens", "positions", "segments", "targets", "weights")
        )
        _, logits = reference.decoder(config, params, tokens, positions, segments)
        total += reference.cross_entropy(logits, targets, weights)
    return total


def computed(config, mesh, params):
    """(loss, (hidden, logits)) and gradients."""
    with jax.set_mesh(mesh):
        placed = building.on_devices(params, building.storage(config, mesh))
        step = building.gradient_step(building.decoder(config, mesh))
        return jax.device_get(
            step(placed, building.placed_batch(config.vocab_size, mesh))
        )


@cache
def results(name, mesh):
    """One model's results, and all that the reference needs to recompute them."""
    config = CONFIGS[name]
    params = building.random_params(config, mesh)
    return config, params, *computed(config, mesh, params)


# What others have too.
RARER = ("gated_heads",)


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.more] if name in RARER else [])
        for name in CONFIGS
    ]
)
def run(request, one_device_mesh):
    return results(request.param, one_device_mesh)


def test_hidden_states_logits_and_loss_equal_the_reference(run):
    config, params, (loss, outputs), _ = run
    batch = building.batch(config.vocab_size)
    for row in range(len(SEGMENTS)):
        inputs = batch["tokens"][row], POSITIONS[row], SEGMENTS[row]
        expected = reference.decoder(config.model_dump(), params, *inputs)
        for got, want in zip(outputs, expected, strict=True):
            assert np.abs(got[row] - want).max() <= 1e-5 * np.abs(want).max()
    assert loss == pytest.approx(
        reference_loss(config.model_dump(), params, batch), rel=1e-5
    )


@pytest.mark.heavy
def test_gradient_of_every_parameter_equals_finite_differences(run):
    """Along one random direction for each parameter, central differences in float64."""
    rng = np.random.default_rng(2)
    step = 1e-5
    config, params, _, grads = run
    grads = flatten_names(grads)
    batch = building.batch(config.vocab_size)

    def at(name, value):
        moved = building.change(params, name, lambda _: value)
        return reference_loss(config.model_dump(), moved, batch)

    for name, value in flatten_names(params).items():
        direction = rng.standard_normal(value.shape)
        direction /= np.linalg.norm(direction)
        slope = (
            (at(name, value + step * direction) - at(name, value - step * direction))
            / 2
            / step
        )
        computed_slope = np.vdot(grads[name], direction)
        size = np.linalg.norm(grads[name])
        assert abs(computed_slope - slope) <= 2e-5 * size + 1e-6, name


@pytest.mark.heavy
def test_a_pattern_that_leaves_layers_over_equals_its_layers_unrolled(one_device_mesh):
    """Five layers of two kinds are two periods and a rest; as a pattern of five, one
    period, in which every layer is written out."""
    mesh = one_device_mesh
    _, params, (loss, aux), grads = results("pattern", mesh)
    kinds = tuple(PATTERN.pattern[i % 2] for i in range(5))
    unrolled = PATTERN.model_copy(update={"pattern": kinds})
    assert [part.num_layers for part in PATTERN.layer_stacks] == [4, 1]
    assert [part.num_layers for part in unrolled.layer_stacks] == [5]

    def as_one(tree):
        stacks = tree["layers"], tree["last_layers"]
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *stacks)
        return {k: v for k, v in tree.items() if k != "last_layers"} | {
            "layers": joined
        }

    (expected, same), unrolled_grads = computed(unrolled, mesh, as_one(params))
    assert loss == pytest.approx(expected, rel=1e-6)
    # XLA orders sums by the processor: 1.4e-5 apart was seen.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), aux, same)
    for name, grad in flatten_names(unrolled_grads).items():
        joined_grad = flatten_names(as_one(grads))[name]
        assert np.abs(joined_grad - grad).max() <= 1e-4 * np.abs(grad).max(), name
