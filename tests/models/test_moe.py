"""The mixture-of-experts layer on one device, against loops in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.models.layers.moe import MoeConfig, route
from maxlm.models.params import bind, flatten_names, param_specs, stack_layers
from maxlm.optim.config import OptimizerConfig
from maxlm.optim.optimizer import make_optimizer
from maxlm.sharding import AxisRules
from tests.models import moe_building as building
from tests.models import moe_reference as reference
from tests.models.building import QUICK, change
from tests.models.moe_building import CONFIGS, SMALL


@pytest.fixture(scope="module")
def computed(one_device_mesh):
    results = {}

    def get(name):
        if name not in results:
            results[name] = building.outputs_and_gradients(
                one_device_mesh, CONFIGS[name]
            )
        return results[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_output_loss_load_and_drops_equal_the_reference(name, computed):
    config = CONFIGS[name].model_dump()
    x, counted, _ = building.inputs()
    want = reference.moe(building.random_params(CONFIGS[name]), x, counted, config)
    y, aux, _ = computed(name)
    np.testing.assert_allclose(y, want[0], atol=2e-5)
    np.testing.assert_allclose(aux.loss, want[1], rtol=1e-5)
    np.testing.assert_array_equal(aux.load, want[2])
    assert aux.dropped == want[3]
    assert (aux.dropped > 0) == (config["dispatch"] == "capacity")


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_finite_differences_of_the_reference(name, computed):
    config = CONFIGS[name].model_dump()
    x, counted, d_y = building.inputs()
    params = building.random_params(CONFIGS[name])
    d_params, d_x = computed(name)[2]
    rng = np.random.default_rng(5)

    def total(params, x):
        y, loss, _, _ = reference.moe(params, x, counted, config)
        return (y * d_y).sum() + loss

    def check(change, grad, direction):
        step = 1e-6
        slope = (total(*change(step)) - total(*change(-step))) / (2 * step)
        assert np.isclose((grad * direction).sum(), slope, rtol=1e-4, atol=1e-3)

    direction = rng.standard_normal(x.shape)
    check(lambda s: (params, x + s * direction), d_x, direction)
    grads = flatten_names(d_params)
    for name, value in flatten_names(params).items():
        if name == "selection_bias":
            continue  # its gradient is a rule, not a slope
        direction = rng.standard_normal(value.shape)

        def moved(step, name=name, direction=direction):
            return change(params, name, lambda v: v + step * direction), x

        check(moved, grads[name], direction)


def test_padding_is_served_by_shared_experts_alone_and_the_bias_gets_the_load(computed):
    _, counted, _ = building.inputs()
    y, aux, (_, d_x) = computed("mixtral")
    assert not counted.all()
    assert (y[~counted] == 0).all()
    assert (d_x[~counted] == 0).all()
    assert aux.load.sum() == 3 * counted.sum()
    _, aux, (d_params, _) = computed("deepseek_v3")
    np.testing.assert_array_equal(
        d_params["selection_bias"], aux.load - aux.load.mean()
    )


def test_the_router_works_in_fp32_when_the_layer_does_not(one_device_mesh):
    config = MoeConfig(num_experts=64, experts_per_token=4, d_ff=2)
    params = building.random_params(config)
    x, counted, _ = building.inputs((4, 32))
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    want = reference.moe(params, x, counted, config.model_dump())
    model = building.layer(config, AxisRules(), jnp.bfloat16)
    with jax.set_mesh(one_device_mesh):
        params = building.placed(one_device_mesh, config, params)
        run = jax.jit(lambda p, *args: bind(model, p)(*args), compiler_options=QUICK)
        y, aux = run(params, jnp.asarray(x, jnp.float32), jnp.asarray(counted))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(aux.load, want[2])
    np.testing.assert_allclose(np.asarray(y, np.float64), want[0], atol=0.15)


def test_scores_have_finite_slopes_where_they_vanish():
    config = MoeConfig(**SMALL, score="sqrt_softplus")
    logits = jnp.linspace(-300.0, 300.0, 8)[None, None]
    slopes = jax.grad(lambda x: route(x, None, config).weights.sum())(logits)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("kind", ["muon", "adafactor"])
def test_optimizers_treat_each_expert_as_a_matrix_of_its_own(kind):
    specs = param_specs(
        stack_layers(building.layer(MoeConfig(**SMALL), AxisRules()), 2)
    )
    rng = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda s: rng.standard_normal(s.shape).astype(np.float32), specs
    )
    params = jax.tree.map(np.zeros_like, grads)

    def update(specs, params, grads):
        config = OptimizerConfig(kind=kind, clip_norm=None)
        optimizer = make_optimizer(config, optax.constant_schedule(1.0), specs)
        return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(
            params, grads
        )

    whole = update(specs, params, grads)
    one = MoeConfig(**SMALL | {"num_experts": 1, "experts_per_token": 1})
    alone = param_specs(stack_layers(building.layer(one, AxisRules()), 2))
    names = ("gate", "up", "down")
    for e in (0, 5):

        def cut(tree, e=e):
            return {name: tree[name][:, e : e + 1] for name in names}

        got = update({name: alone[name] for name in names}, cut(params), cut(grads))
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), cut(whole), got
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 9}, "experts_per_token=9 of num_experts=8"),
        ({"groups": 3}, "num_experts=8 is not a multiple of groups=3"),
        ({"groups": 2, "groups_per_token": 3}, "groups_per_token=3 of groups=2"),
        ({"groups": 4, "groups_per_token": 1}, "experts_per_token=3 cannot come from"),
        (
            {"groups": 8, "groups_per_token": 8, "group_score": "top2"},
            "groups of 1 expert",
        ),
        ({"shared_gate": True}, "shared_gate or shared_d_ff without shared experts"),
        (
            {"gated": False, "activation": {"kind": "clamped_swiglu"}},
            "activation.kind=clamped_swiglu without a gate",
        ),
    ],
)
def test_impossible_settings_are_refused_with_their_values(change, message):
    with pytest.raises(MaxlmError, match=message):
        MoeConfig(**SMALL | change)


@given(
    most=st.integers(4, 12),
    groups=st.integers(1, 12),
    size=st.integers(1, 20),
    met=st.integers(1, 12),
    per_token=st.integers(1, 30),
    rank=st.sampled_from(["max", "top2"]),
)
def test_fewer_experts_are_possible_and_routed_alike(
    most, groups, size, met, per_token, rank
):
    met = min(met, groups)
    experts = groups * size
    assume(rank == "max" or size > 1)
    config = MoeConfig(
        num_experts=experts,
        experts_per_token=min(per_token, met * size),
        d_ff=8,
        groups=groups,
        groups_per_token=met,
        group_score=rank,
    )
    small = config.limit_experts(most)
    assert small == MoeConfig.model_validate(small.model_dump())
    assert small.num_experts <= most
    assert (small == config) == (experts <= most)
    if experts > most:
        assert most // 2 < small.num_experts
        assert small.experts_per_token <= min(
            config.experts_per_token, small.num_experts / 2
        )
        limited = config.groups_per_token < config.groups
        assert (small.groups_per_token < small.groups) == limited
