"""Decoders compute what the papers say: hidden states, logits, loss and gradients equal those of
a float64 NumPy implementation, packed rows and padding included."""

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
            batch[k][row] for k in ("tokens", "positions", "segments", "targets", "weights")
        )
        _, logits = reference.decoder(config, params, tokens, positions, segments)
        total += reference.cross_entropy(logits, targets, weights)
    return total


def batch_of(config):
    tokens, targets, weights = building.tokens_and_targets(config.vocab_size, SEGMENTS.shape)
    return {
        "tokens": tokens,
        "positions": POSITIONS,
        "segments": SEGMENTS,
        "targets": targets,
        "weights": weights * (SEGMENTS > 0),
    }


def computed(config, mesh, params, batch):
    """(loss, (hidden, logits)) and gradients."""
    with jax.set_mesh(mesh):
        model = building.decoder(config, mesh)
        placed = building.on_devices(params, building.storage(config, mesh))
        arrays = dict(zip(batch, building.rows(mesh, *batch.values()), strict=True))
        step = jax.jit(
            jax.value_and_grad(lambda p, b: building.loss(model, p, b), has_aux=True),
            compiler_options=building.QUICK,
        )
        return jax.device_get(step(placed, arrays))


@pytest.fixture(scope="module", params=CONFIGS)
def run(request, one_device_mesh):
    """One model's results, and all that the reference needs to recompute them."""
    config, mesh = CONFIGS[request.param], one_device_mesh
    params, batch = building.random_params(config, mesh), batch_of(config)
    (loss, (hidden, logits)), grads = computed(config, mesh, params, batch)
    return {
        "config": config.model_dump(),
        "params": params,
        "batch": batch,
        "loss": loss,
        "hidden": hidden,
        "logits": logits,
        "grads": grads,
    }


def test_hidden_states_and_logits_equal_the_reference(run):
    batch = run["batch"]
    for row in range(len(SEGMENTS)):
        hidden, logits = reference.decoder(
            run["config"], run["params"], batch["tokens"][row], POSITIONS[row], SEGMENTS[row]
        )
        assert np.abs(run["hidden"][row] - hidden).max() <= 1e-5 * np.abs(hidden).max()
        assert np.abs(run["logits"][row] - logits).max() <= 1e-5 * np.abs(logits).max()


def test_loss_equals_the_reference(run):
    expected = reference_loss(run["config"], run["params"], run["batch"])
    assert run["loss"] == pytest.approx(expected, rel=1e-5)


def test_gradient_of_every_parameter_equals_finite_differences(run):
    """Along one random direction for each parameter, central differences in float64."""
    rng, step = np.random.default_rng(2), 1e-5
    grads = flatten_names(run["grads"])

    def at(name, value):
        def replace(tree, prefix):
            return {
                k: replace(v, f"{prefix}{k}.")
                if isinstance(v, dict)
                else (value if f"{prefix}{k}" == name else v)
                for k, v in tree.items()
            }

        return reference_loss(run["config"], replace(run["params"], ""), run["batch"])

    for name, value in flatten_names(run["params"]).items():
        direction = rng.standard_normal(value.shape)
        direction /= np.linalg.norm(direction)
        slope = (at(name, value + step * direction) - at(name, value - step * direction)) / 2 / step
        found, size = np.vdot(grads[name], direction), np.linalg.norm(grads[name])
        assert abs(found - slope) <= 2e-5 * size + 1e-6, name


def test_a_pattern_that_leaves_layers_over_equals_its_layers_unrolled(one_device_mesh):
    """Five layers of two kinds are two periods and a rest; as a pattern of five, one period, in
    which every layer is written out."""
    mesh, batch = one_device_mesh, batch_of(PATTERN)
    params = building.random_params(PATTERN, mesh)
    kinds = tuple(PATTERN.pattern[i % 2] for i in range(5))
    unrolled = PATTERN.model_copy(update={"pattern": kinds})
    assert [part.depth for part in PATTERN.parts] == [4, 1]
    assert [part.depth for part in unrolled.parts] == [5]

    def as_one(tree):
        stacks = tree["layers"], tree["last_layers"]
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *stacks)
        return {k: v for k, v in tree.items() if k != "last_layers"} | {"layers": joined}

    (loss, aux), grads = computed(PATTERN, mesh, params, batch)
    (expected, same), wanted = computed(unrolled, mesh, as_one(params), batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    # XLA orders sums by the processor: 1.4e-5 apart was seen.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), aux, same)
    for name, grad in flatten_names(wanted).items():
        found = flatten_names(as_one(grads))[name]
        assert np.abs(found - grad).max() <= 1e-4 * np.abs(grad).max(), name
