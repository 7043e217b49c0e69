"""Small odd-sized mixture-of-experts layers on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.models.build_context import BuildContext
from maxlm.models.layers.moe import Moe, MoeConfig
from maxlm.models.params import Params, bind, param_specs
from maxlm.sharding import AxisRules, ShardingConfig
from tests.models.building import QUICK, on_devices, shardings

D_MODEL = 12
SMALL: dict[str, Any] = {"num_experts": 8, "experts_per_token": 3, "d_ff": 6}
MIXTRAL = MoeConfig(**SMALL, balance_loss=0.3, z_loss=0.05)
DEEPSEEK_V2 = MoeConfig(
    **SMALL,
    renormalise=False,
    scale=1.5,
    groups=4,
    groups_per_token=2,
    balance_loss=0.2,
    shared_experts=2,
)
DEEPSEEK_V3 = MoeConfig(
    **SMALL,
    score="sigmoid",
    scale=2.5,
    selection_bias=True,
    groups=4,
    groups_per_token=2,
    group_score="top2",
    balance_loss=0.1,
    shared_experts=1,
)
UNGATED = MoeConfig(
    num_experts=5,
    experts_per_token=1,
    d_ff=7,
    gated=False,
    activation="gelu",
    renormalise=False,
)
CAPACITY = MoeConfig(
    **SMALL, dispatch="capacity", capacity_factor=0.7, balance_loss=0.3
)
GPT_OSS = MoeConfig(
    num_experts=8,
    experts_per_token=3,
    d_ff=6,
    # Low enough to cut off much.
    activation={"kind": "clamped_swiglu", "limit": 0.8},
    bias=True,
    router_bias=True,
    z_loss=0.05,
)
QWEN2_MOE = MoeConfig(
    **SMALL, renormalise=False, shared_experts=1, shared_d_ff=10, shared_gate=True
)
LLAMA4 = MoeConfig(
    num_experts=6,
    experts_per_token=2,
    d_ff=6,
    score="sigmoid",
    renormalise=False,
    weigh_inputs=True,
    bias=True,
    shared_experts=1,
    balance_loss=0.2,
)
NEMOTRON_3 = MoeConfig(
    **SMALL,
    activation="relu2",
    gated=False,
    score="sqrt_softplus",
    scale=2.5,
    selection_bias=True,
    shared_experts=1,
    shared_d_ff=10,
    latent_dim=10,
)
BIASED_CAPACITY = CAPACITY.model_copy(update={"bias": True, "weigh_inputs": True})
CONFIGS = {
    "gpt_oss": GPT_OSS,
    "qwen2_moe": QWEN2_MOE,
    "llama4": LLAMA4,
    "nemotron_3": NEMOTRON_3,
    "biased_capacity": BIASED_CAPACITY,
    "mixtral": MIXTRAL,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "ungated": UNGATED,
    "capacity": CAPACITY,
}


def compute_rules(mesh: Mesh, **changes: Any) -> AxisRules:
    compute = ShardingConfig().compute.model_dump() | changes
    return AxisRules(**compute).for_mesh(dict(mesh.shape))


def layer(config: MoeConfig, rules: AxisRules, dtype: Any = jnp.float32) -> Moe:
    context = BuildContext(rules, dtype, D_MODEL, num_layers=3, init_std=0.3)
    return Moe(config, context)


def random_params(config: MoeConfig, seed: int = 0) -> Params:
    """float64 NumPy values that fp32 holds exactly."""
    rng = np.random.default_rng(seed)

    def draw(spec):
        return (
            (0.5 * rng.standard_normal(spec.shape))
            .astype(np.float32)
            .astype(np.float64)
        )

    return jax.tree.map(draw, param_specs(layer(config, AxisRules())))


def inputs(shape=(8, 6), seed: int = 1):
    """(x [B, S, D], counted [B, S] with some padding, cotangent [B, S, D])."""
    rng = np.random.default_rng(seed)
    x, d_y = (
        rng.standard_normal((2, *shape, D_MODEL)).astype(np.float32).astype(np.float64)
    )
    return x, rng.random(shape) < 0.8, d_y


def placed(mesh: Mesh, config: MoeConfig, params: Params) -> Params:
    """Parameters in the default storage layout."""
    specs = param_specs(layer(config, AxisRules()))
    return on_devices(params, shardings(specs, mesh))


def draw_routes(config: MoeConfig, shape=(8, 6)) -> np.ndarray:
    """Experts at random, int8 [B, S, k]; of every third token none."""
    rng = np.random.default_rng(7)
    order = rng.permuted(
        np.broadcast_to(np.arange(config.num_experts), (*shape, config.num_experts)),
        axis=-1,
    )
    routes = order[..., : config.experts_per_token].astype(np.int8)
    routes[:, ::3] = -1
    return routes


def outputs_and_gradients(
    mesh: Mesh,
    config: MoeConfig,
    routes: np.ndarray | None = None,
    **settings: str | tuple[str, ...],
) -> Any:
    """(y, aux, gradients of Σ y · d_y + aux.loss in parameters and x), as NumPy;
    ``settings`` are compute rules."""
    model = layer(config, compute_rules(mesh, **settings))
    with jax.set_mesh(mesh):
        spec = model.rules.spec("batch", "residual")
        x, counted, d_y = (
            jax.device_put(
                a.astype(np.float32) if a.ndim == 3 else a, NamedSharding(mesh, spec)
            )
            for a in inputs()
        )

        placed_routes = None
        if routes is not None:
            placed_routes = jax.device_put(routes, NamedSharding(mesh, spec))

        def loss(params, x):
            y, aux = bind(model, params)(x, counted, placed_routes)
            return jnp.sum(y * d_y) + aux.loss, (y, aux)

        run = jax.jit(
            jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=QUICK
        )
        params = placed(mesh, config, random_params(config))
        (_, (y, aux)), grads = run(params, x)
        for param, grad in zip(*map(jax.tree.leaves, (params, grads[0])), strict=True):
            assert grad.sharding.is_equivalent_to(param.sharding, grad.ndim)
    return jax.tree.map(np.asarray, (y, aux, grads))
