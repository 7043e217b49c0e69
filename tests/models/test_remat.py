"""Remat policies trade memory for work and change no result."""

import jax
import numpy as np
import pytest

from maxlm.models.architectures.pattern import LayerKind
from tests.models import building
from tests.models.building import GPT2, LLAMA_GQA, SEGMENTS

POLICIES = ("none", "matmuls", "mlp", "attention", "full")


@pytest.mark.heavy
def test_loss_and_gradients_are_the_same_under_every_policy(one_device_mesh):
    mesh = one_device_mesh
    results = {}
    with jax.set_mesh(mesh):
        params = building.placed_params(LLAMA_GQA, mesh)
        batch = building.placed_batch(23, mesh)
        for policy in POLICIES:
            model = building.decoder(
                LLAMA_GQA.model_copy(update={"remat": policy}), mesh
            )
            (loss, _), grads = building.gradient_step(model)(params, batch)
            results[policy] = jax.device_get((loss, grads))
    loss, grads = results["none"]
    for policy in POLICIES[1:]:
        np.testing.assert_allclose(results[policy][0], loss, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max()),
            results[policy][1],
            grads,
        )


@pytest.mark.parametrize(("kinds", "depth"), [(1, 4), (2, 4), (1, 1)])
def test_layers_of_one_turn_are_computed_again_one_after_the_other(
    one_device_mesh, kinds, depth
):
    """Where a turn of the loop has several, or the loop one turn, a barrier keeps a
    compiler from computing all of them at once, or from keeping what it is not to
    keep."""
    mesh = one_device_mesh
    pattern = tuple(LayerKind(window=window) for window in (3, None)[:kinds])
    changes = {"remat": "full", "pattern": pattern, "num_layers": depth}
    config = LLAMA_GQA.model_copy(update=changes)
    model = building.decoder(config, mesh)
    with jax.set_mesh(mesh):
        params = building.placed_params(config, mesh)
        batch = building.placed_batch(23, mesh)
        text = str(building.gradient_step(model).trace(params, batch).jaxpr)
    barriers = text.count("prevent_cse=True")
    assert barriers == (0 if kinds == 1 < depth else kinds)


def saved_per_token_and_layer(config, mesh) -> int:
    """Elements of a layer that the forward pass hands to the backward pass, for each
    token."""
    model = building.decoder(config, mesh)

    def residuals(params, batch):
        return jax.vjp(lambda p: building.loss(model, p, batch)[0], params)[1]

    with jax.set_mesh(mesh):
        arguments = (
            building.placed_params(config, mesh),
            building.placed_batch(23, mesh),
        )
        saved = jax.tree.leaves(jax.eval_shape(residuals, *arguments))
    of_layers = [
        x for x in saved if x.shape[:3] == (config.num_layers, *SEGMENTS.shape)
    ]
    return sum(x.size for x in of_layers) // (config.num_layers * SEGMENTS.size)


@pytest.mark.parametrize("config", [LLAMA_GQA, GPT2], ids=["llama", "gpt2"])
def test_each_policy_keeps_what_it_documents(one_device_mesh, config):
    D, F = config.d_model, config.mlp.d_ff
    heads = config.attention
    queries, keys = (
        heads.num_heads * heads.head_dim,
        heads.num_kv_heads * heads.head_dim,
    )
    hidden = 2 * F if config.mlp.gated else F
    saved = {
        policy: saved_per_token_and_layer(
            config.model_copy(update={"remat": policy}), one_device_mesh
        )
        for policy in POLICIES
    }
    assert saved["full"] == D
    attended = queries + heads.num_heads  # the output, and a log-sum-exp a head
    assert saved["attention"] == D + attended
    assert saved["mlp"] == D + hidden
    assert saved["matmuls"] == D + attended + (queries + 2 * keys) + hidden
    # Inputs of both norms and of all linear maps, and q, k, v and what attention gave.
    assert saved["none"] == 4 * D + queries + attended + 2 * keys + hidden + F
