"""Router replay: tokens that are given their experts meet these, weighted by the
router's own scores, and gradients reach the router."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.data.batch_source import BatchArraySpec
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.routes import get_route_shape
from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.layers.moe import MoeConfig, route
from maxlm.models.params import Params, bind
from maxlm.optim.step import compute_loss_and_gradients
from maxlm.parallel.cross_entropy import fused_cross_entropy_loss
from maxlm.run.global_batch import (
    batch_sharding,
    get_local_row_indices,
    make_global_batch,
)
from maxlm.run.setup import set_up_run
from maxlm.sharding import bind_mesh
from tests.models import building, moe_building, moe_reference, reference
from tests.models.building import POSITIONS, QUICK, SEGMENTS
from tests.models.moe_building import CONFIGS
from tests.train import cells

# A dense layer before four of another width, of which every other has no experts.
SETTINGS: dict[str, Any] = {
    "vocab_size": 37,
    "num_layers": 5,
    "d_model": 12,
    "max_seq_len": 16,
    "attention": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 4},
    "mlp": {"d_ff": 20},
    "moe": {"num_experts": 7, "experts_per_token": 3, "d_ff": 6, "balance_loss": 0.1},
    "dense_layers": 1,
}
UNIFORM = DecoderConfig.model_validate(SETTINGS)
ALIKE = UNIFORM.model_copy(update={"num_layers": 4, "dense_layers": 0})
KINDS = DecoderConfig.model_validate(
    SETTINGS
    | {
        "num_layers": 7,
        "kinds": {"wide": {"window": 3}, "dense": {"ffn": "mlp"}, "full": {}},
        "pattern": ["wide", "dense", "full"],
    }
)


def test_weights_of_given_experts_are_their_scores_and_have_slopes():
    """A softmax over two of four experts, which the router ranks last."""
    config = MoeConfig(num_experts=4, experts_per_token=2, d_ff=1)
    logits = jnp.asarray([[[3.0, 0.5, 2.0, -1.0], [3.0, 0.5, 2.0, -1.0]]])
    routes = jnp.asarray([[[3, 1], [-1, -1]]])
    routing = route(logits, None, config, routes)
    np.testing.assert_array_equal(routing.expert_ids, [[[3, 1], [0, 2]]])
    np.testing.assert_array_equal(routing.is_rerouted, [[[True, True], [False, False]]])
    first = 1 / (1 + np.exp(1.5))
    np.testing.assert_allclose(routing.weights[0, 0], [first, 1 - first], rtol=1e-6)
    slopes = jax.grad(lambda x: route(x, None, config, routes).weights[0, 0, 0])(logits)
    slope = first * (1 - first)
    np.testing.assert_allclose(slopes[0, 0], [0, -slope, 0, slope], atol=1e-7)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3",
        *(
            pytest.param(name, marks=pytest.mark.more)
            for name in CONFIGS
            if name != "deepseek_v3"
        ),
    ],
)
def test_a_layer_with_routes_equals_a_loop_over_tokens(name, one_device_mesh):
    config = CONFIGS[name]
    settings = config.model_dump()
    x, counted, d_y = moe_building.inputs()
    routes = moe_building.draw_routes(config)
    params = moe_building.random_params(config)
    y, aux, (d_params, _) = moe_building.outputs_and_gradients(
        one_device_mesh, config, routes
    )
    want = moe_reference.moe(params, x, counted, settings, routes)
    without_routes = moe_reference.moe(params, x, counted, settings)
    np.testing.assert_allclose(y, want[0], atol=2e-5)
    assert np.abs(want[0] - without_routes[0]).max() > 0.1
    np.testing.assert_allclose(aux.loss, want[1], rtol=1e-5)
    np.testing.assert_array_equal(aux.load, want[2])
    assert aux.dropped == want[3]

    # The router's gradient, by finite differences with the routes held.
    direction = np.random.default_rng(5).standard_normal(params["router"].shape)

    def total(step):
        changed = params | {"router": params["router"] + step * direction}
        y, loss, _, _ = moe_reference.moe(changed, x, counted, settings, chosen)
        return (y * d_y).sum() + loss

    chosen = aux.expert_ids
    slope = (total(1e-6) - total(-1e-6)) / 2e-6
    assert abs(slope) > 0.1
    assert np.isclose((d_params["router"] * direction).sum(), slope, 1e-4, 1e-3)


def run(
    model: Decoder, params: Params, routes: jax.Array | None, *, record: bool = False
) -> Any:
    """((loss, (hidden, aux)), gradients) of three rows of several documents."""
    tokens, _, _ = building.tokens_and_targets(model.config.vocab_size)
    d_hidden = np.random.default_rng(2).standard_normal((*SEGMENTS.shape, 12))

    def loss(params: Params, routes: jax.Array | None) -> Any:
        hidden, aux = bind(model, params)(
            tokens, POSITIONS, SEGMENTS, routes=routes, record_routes=record
        )
        return jnp.sum(hidden * d_hidden) + aux.loss, (hidden, aux)

    step = jax.value_and_grad(loss, has_aux=True)
    return jax.jit(step, compiler_options=QUICK)(params, routes)


@pytest.mark.heavy
@pytest.mark.parametrize("config", [ALIKE, pytest.param(KINDS, marks=pytest.mark.more)])
def test_a_model_s_own_routes_change_no_bit(config, one_device_mesh):
    params = building.placed_params(config, one_device_mesh)
    model = building.decoder(config, one_device_mesh)
    with jax.set_mesh(one_device_mesh):
        (loss, (hidden, aux)), grads = run(model, params, None, record=True)
        replayed = run(model, params, aux.routes)
    (other_loss, (other_hidden, other_aux)), other_grads = replayed
    assert aux.routes.shape == (*SEGMENTS.shape, 4, 3)
    assert aux.routes.dtype == get_route_shape(config).dtype == np.int8
    assert loss == other_loss
    np.testing.assert_array_equal(hidden, other_hidden)
    jax.tree.map(np.testing.assert_array_equal, grads, other_grads)
    assert other_aux.sums["expert_rerouted"] == 0


def decode(params: Params, tokens, positions, segments, routes, config) -> np.ndarray:
    """Hidden states [S, D] of one row in float64, each token through the experts that it
    is given; routes int [S, E, k]."""
    x = reference.embedded(config, params, tokens, positions)
    seen = (positions, segments, config["positions"], config["norm"])
    counted = segments > 0
    expert_layer = 0
    for p in reference.layers_of(params):
        layer_routes = None
        if "moe" in p:
            layer_routes = routes[:, expert_layer]
            expert_layer += 1

        def attend(y, p=p):
            return reference.self_attention(
                y, p["attention"], seen, config["attention"], None, None
            )

        def feed(y, p=p, layer_routes=layer_routes):
            if layer_routes is None:
                rows = [reference.mlp(row, p["mlp"], config["mlp"]) for row in y]
                return np.array(rows)
            y, *_ = moe_reference.moe(
                p["moe"], y[None], counted[None], config["moe"], layer_routes[None]
            )
            return y[0]

        def normed(y, p):
            return reference.norms(y, p, config["norm"])

        x = reference.block(x, p, attend, feed, normed, config["placement"])
    return reference.norms(x, params["final_norm"], config["norm"])


def draw_model_routes(config: TransformerConfig, shape: tuple[int, ...]) -> np.ndarray:
    """Experts at random, [B, S, E, k]; of every fourth token none."""
    route_shape = get_route_shape(config)
    moe = config.moe
    assert moe is not None
    rng = np.random.default_rng(4)
    all_ids = np.broadcast_to(
        np.arange(moe.num_experts, dtype=route_shape.dtype),
        (*shape, route_shape.num_layers, moe.num_experts),
    )
    routes = rng.permuted(all_ids, axis=-1)[..., : route_shape.experts_per_token]
    routes[:, 3::4] = -1
    return routes


@pytest.mark.heavy
def test_a_model_with_routes_equals_a_loop_over_tokens(one_device_mesh):
    config = UNIFORM
    params = building.random_params(config, one_device_mesh)
    routes = draw_model_routes(config, SEGMENTS.shape)
    model = building.decoder(config, one_device_mesh)
    with jax.set_mesh(one_device_mesh):
        placed = building.placed_params(config, one_device_mesh)
        (_, (hidden, aux)), grads = run(model, placed, jnp.asarray(routes))
    tokens, _, _ = building.tokens_and_targets(config.vocab_size)
    settings = config.model_dump()
    for row, got in enumerate(np.asarray(hidden)):
        want = decode(
            params, tokens[row], POSITIONS[row], SEGMENTS[row], routes[row], settings
        )
        is_token = SEGMENTS[row] > 0
        np.testing.assert_allclose(got[is_token], want[is_token], atol=1e-4)
    # Most tokens' experts are not their router's; its gradient is there all the same.
    sums = {name: float(value) for name, value in aux.sums.items()}
    assert 0.3 < sums["expert_rerouted"] / sums["expert_load"] < 0.75
    assert np.abs(grads["layers"]["moe"]["router"]).min() > 0


def differentiate(cell: cells.Cell, model_name: str) -> dict[str, np.ndarray]:
    """Loss, sums and gradients of a batch with routes, in the layout of a cell."""
    run_config = cells.config_of(model_name, cell)
    setup = set_up_run(run_config, cells.devices_of(run_config))
    config = run_config.model
    routes = draw_model_routes(config, (cells.ROWS * cells.MICRO, cells.SEQ))
    arrays = setup.config.task.batch_arrays(cells.SEQ) | {
        "routes": BatchArraySpec(routes.shape[1:], routes.dtype, ("seq", None, None))
    }
    lead = (cells.MICRO, cells.ROWS)
    rules = setup.placed.compute
    rows = get_local_row_indices(batch_sharding(rules, setup.mesh, ()), lead)
    drawn = cells.batches(config.vocab_size)[0] | {"routes": routes}
    host_batch = {name: drawn[name] for name in arrays}
    batch = make_global_batch(
        host_batch, arrays, rows, rules, setup.mesh, lead, setup.token_order
    )

    def compute_loss(model, batch, key):
        hidden, aux = model(
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            routes=batch["routes"],
        )
        loss, _ = fused_cross_entropy_loss(
            model.prepare_logits(hidden), batch["targets"], batch["weights"]
        )
        return loss + aux.loss, aux.sums

    @jax.jit
    def step(params, batch):
        return compute_loss_and_gradients(
            setup.model, compute_loss, params, batch, jax.random.key(0)
        )

    # The same values whatever the layout of stacks.
    flat = building.draw_params(jax.tree.map(lambda spec: spec, setup.specs))
    params = jax.tree.map(
        lambda x, sharding: jax.device_put(np.asarray(0.5 * x, np.float32), sharding),
        flat,
        setup.shardings.params,
    )
    lowered = bind_mesh(setup.mesh, step.lower)(params, batch)
    (loss, sums), grads = lowered.compile(compiler_options=QUICK)(params, batch)
    return {
        "loss": np.asarray(loss),
        **{name: np.asarray(value) for name, value in sums.items()},
        **cells.canonical(setup, grads),
    }


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, np.ndarray]:
    return differentiate(cells.ALONE, "moe")


@pytest.mark.more
@pytest.mark.parametrize(
    "name",
    [
        "ep × fsdp × tp",
        "fsdp × cp ring × tp+sp",
        "ep × pp 1f1b × tp+sp",
        "ep × pp circular",
    ],
)
def test_routes_are_the_same_in_any_layout(name, on_one_device):
    got = differentiate(cells.CELLS[name], "moe")
    assert got.keys() == on_one_device.keys()
    for key, want in on_one_device.items():
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(
            got[key], want, rtol=1e-5, atol=1e-5 * scale, err_msg=key
        )
    assert got["expert_rerouted"] > 0.3 * got["expert_load"]
