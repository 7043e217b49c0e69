"""Optimizers and schedules against independent float64 formulas, and sharded against
one device."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.models.params import ParamSpec
from maxlm.optim.config import OptimizerConfig
from maxlm.optim.optimizer import make_optimizer, opt_state_specs
from maxlm.optim.schedule import ScheduleConfig, make_schedule
from maxlm.optim.state import param_shardings
from maxlm.sharding.rules import StorageRules
from tests.errors import message

LR, WD = 0.01, 0.3
B1, B2, EPS = 0.8, 0.9, 1e-3
KINDS = ["adamw", "lion", "adafactor", "muon"]
UNLIKE = ["adamw", "adafactor", "muon"]  # lion is made and placed as adamw is


def spec(shape, axes, role, contract=()):
    return ParamSpec(shape, axes, jax.nn.initializers.normal(), role, contract)


# One of each role; heads before and after, a stack of layers, odd sizes.
SPECS = {
    "embed": {"table": spec((10, 6), ("vocab", "embed"), "table")},
    "norm": spec((6,), ("embed",), "vector"),
    "layers": {
        "scale": spec((3, 6), ("layers", "embed"), "vector"),
        "query": spec(
            (3, 6, 2, 5), ("layers", "embed", "heads", "head_dim"), "matrix", (1,)
        ),
        "output": spec(
            (3, 2, 5, 6), ("layers", "heads", "head_dim", "embed"), "matrix", (1, 2)
        ),
        "up": spec((3, 6, 14), ("layers", "embed", "mlp"), "matrix", (1,)),
    },
}


def values(seed, specs=SPECS):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), specs)


def run(config, steps=3):
    """(parameters, gradients of each step, parameters after each step), the last two
    lists."""
    optimizer = make_optimizer(config, optax.constant_schedule(LR), SPECS)
    grads = [values(step + 1) for step in range(steps)]
    after = [values(0)]
    state = jax.jit(optimizer.init)(after[0])
    step = jax.jit(partial(one_step, optimizer))
    for g in grads:
        params, state = step(after[-1], state, g)
        after.append(params)
    return after[0], grads, after[1:]


def one_step(optimizer, params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def f64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def per_leaf(formula, params, grads):
    """Run ``formula(t, g, memory) -> direction`` for each leaf in numpy, then decay and
    step."""

    def leaf(spec, p, *gs):
        memory = {}
        for t, g in enumerate(gs, start=1):
            direction = formula(t, g, memory)
            p = p - LR * (direction + (WD * p if spec.role != "vector" else 0.0))
        return p

    return jax.tree.map(leaf, SPECS, f64(params), *map(f64, grads))


def assert_close(got, want, **tolerance: float):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), f64(got), want
    )


def adam(t, g, memory):
    memory["m"] = B1 * memory.get("m", 0) + (1 - B1) * g
    memory["v"] = B2 * memory.get("v", 0) + (1 - B2) * g**2
    return memory["m"] / (1 - B1**t) / (np.sqrt(memory["v"] / (1 - B2**t)) + EPS)


def lion(t, g, memory):
    m = memory.get("m", 0.0)
    memory["m"] = B2 * m + (1 - B2) * g
    return np.sign(B1 * m + (1 - B1) * g)


@pytest.mark.parametrize(("kind", "formula"), [("adamw", adam), ("lion", lion)])
def test_update_equals_its_formula_with_decay_on_matrices_and_tables_only(
    kind, formula
):
    config = OptimizerConfig(
        kind=kind, b1=B1, b2=B2, eps=EPS, weight_decay=WD, clip_norm=None
    )
    params, grads, after = run(config)
    assert_close(after[-1], per_leaf(formula, params, grads), rtol=1e-5, atol=1e-6)


def test_adafactor_equals_optax_on_each_layers_matrix():
    config = OptimizerConfig(kind="adafactor", weight_decay=0.0, clip_norm=None)
    params, grads, after = run(config)
    reference = optax.adafactor(
        LR, min_dim_size_to_factor=1, multiply_by_parameter_scale=False
    )
    init, step = jax.jit(reference.init), jax.jit(partial(one_step, reference))
    flat = {"query": (6, 10), "output": (10, 6), "up": (6, 14), "scale": (6,)}

    def apart(tree):
        layers = tree["layers"]
        return {n: [layers[n][i].reshape(s) for i in range(3)] for n, s in flat.items()}

    p = apart(params)
    state = init(p)
    for g in grads:
        p, state = step(p, state, apart(g))
    assert_close(apart(after[-1]), p, rtol=1e-5, atol=1e-6)


def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adamw():
    """The update has the singular vectors of the gradient, U' M V being diagonal and
    positive, and singular values near 1: five iterations bring them between about 0.7
    and 1.2."""
    shared = {"weight_decay": 0.0, "clip_norm": None}
    config = OptimizerConfig(kind="muon", update_rms=0.2, **shared)
    params, grads, after = run(config, steps=1)
    adamw = run(OptimizerConfig(kind="adamw", **shared), steps=1)[2]
    flat = {"query": (6, 10), "output": (10, 6), "up": (6, 14)}
    for name, shape in flat.items():
        moved = (np.asarray(after[-1]["layers"][name]) - params["layers"][name]) / -LR
        for layer in range(3):
            u, _, vt = np.linalg.svd(
                f64(grads[0])["layers"][name][layer].reshape(shape), False
            )
            inner = (
                u.T @ moved[layer].reshape(shape) @ vt.T / (0.2 * np.sqrt(max(shape)))
            )
            assert np.diag(inner).min() > 0.6, (name, layer)
            assert np.diag(inner).max() < 1.3, (name, layer)
            assert np.abs(inner - np.diag(np.diag(inner))).max() < 2e-2
    for path in (("norm",), ("embed", "table"), ("layers", "scale")):
        got, want = after[-1], adamw[-1]
        for key in path:
            got, want = got[key], want[key]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("clip_norm", [0.5, 0, None])
def test_clipping_scales_all_gradients_to_the_global_norm(clip_norm):
    config = OptimizerConfig(kind="lion", clip_norm=clip_norm, b1=0.0, b2=0.0)
    optimizer = make_optimizer(config, optax.constant_schedule(LR), SPECS)
    params, grads = values(0), values(1)
    _, state = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(f64(grads))))
    assert norm > 0.5
    want = jax.tree.map(lambda g: g * 0.5 / norm if clip_norm else g, f64(grads))
    assert_close(state[1].mu, want, rtol=1e-5)  # with b2 = 0, the clipped gradient


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_parameter_by_rule_steps_against_the_sign_and_changes_nothing_else(kind):
    bias = replace(spec((3, 5), ("layers", None), "vector"), sign_update=True)
    specs = {**SPECS, "layers": {**SPECS["layers"], "selection_bias": bias}}
    rule = np.array(
        [[7e3, -1e-3, 0, 2, -9]] * 3, np.float32
    )  # too large to be let into clipping
    config = OptimizerConfig(kind=kind, rule_step=0.25, weight_decay=WD, clip_norm=0.5)

    def update(specs, params, grads):
        optimizer = make_optimizer(config, optax.constant_schedule(LR), specs)
        return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(
            params, grads
        )

    params, grads = values(0), values(1)
    want = update(SPECS, params, grads)
    params["layers"]["selection_bias"] = np.ones_like(rule)
    grads["layers"]["selection_bias"] = rule
    got = update(specs, params, grads)
    np.testing.assert_array_equal(
        got["layers"].pop("selection_bias"), -0.25 * np.sign(rule)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_fp32_and_laid_out_like_its_parameters_without_devices(kind):
    axes = ("stage", "fsdp", "tensor")
    mesh = AbstractMesh((1, 2, 2), axes, axis_types=(AxisType.Explicit,) * 3)
    rules = StorageRules(embed=("fsdp",))
    optimizer = make_optimizer(
        OptimizerConfig(kind=kind), optax.constant_schedule(LR), SPECS
    )
    state = opt_state_specs(optimizer, SPECS)
    real = jax.jit(optimizer.init)(values(0))
    for abstract, array in zip(
        jax.tree.leaves(state), jax.tree.leaves(real), strict=True
    ):
        assert (abstract.shape, abstract.dtype) == (array.shape, array.dtype)
    leaves = jax.tree.leaves(state)
    assert {leaf.dtype for leaf in leaves} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert jax.tree.structure(state) == jax.tree.structure(real)
    query = rules.spec(*SPECS["layers"]["query"].axes)
    assert query == P("stage", "fsdp", "tensor", None)
    shardings = param_shardings(state, rules, mesh)
    by_name = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.spec
        for path, leaf in jax.tree_util.tree_flatten_with_path(shardings)[0]
    }
    moments = {
        name: spec for name, spec in by_name.items() if name.endswith("layers.query")
    }
    if kind == "adafactor":
        rows, columns = P("stage", "fsdp", None, None), P("stage", None, "tensor", None)
        assert set(moments.values()) == {rows, columns}
    else:
        assert len(moments) == {"adamw": 2, "lion": 1, "muon": 1}[kind]
        assert set(moments.values()) == {query}
    counts = [spec for name, spec in by_name.items() if name.endswith("count")]
    assert counts
    assert set(counts) == {P()}


@pytest.mark.parametrize("kind", UNLIKE)
def test_eight_devices_equal_one_and_keep_their_layout(kind, mesh):
    specs = {**SPECS, "layers": {k: v for k, v in SPECS["layers"].items() if k != "up"}}
    optimizer = make_optimizer(
        OptimizerConfig(kind=kind), optax.constant_schedule(LR), specs
    )
    step = jax.jit(partial(one_step, optimizer))

    alone = (values(0, specs), jax.jit(optimizer.init)(values(0, specs)))
    for seed in (1, 2):
        alone = step(*alone, values(seed, specs))

    eight = mesh(data=2, fsdp=2, tensor=2)
    layout = jax.tree.map(
        lambda s: NamedSharding(eight, StorageRules().spec(*s.axes)), specs
    )
    with jax.set_mesh(eight):
        shardings = param_shardings(
            opt_state_specs(optimizer, specs), StorageRules(), eight
        )
        params = jax.device_put(values(0, specs), layout)
        sharded = (params, jax.jit(optimizer.init, out_shardings=shardings)(params))
        for seed in (1, 2):
            sharded = step(*sharded, jax.device_put(values(seed, specs), layout))

    def check(array, requested, want):
        assert array.sharding.is_equivalent_to(requested, array.ndim)
        np.testing.assert_allclose(
            jax.device_get(array), jax.device_get(want), atol=1e-6
        )

    jax.tree.map(check, sharded, (layout, shardings), alone)


PEAK, FINAL, WARMUP, TOTAL = 3e-3, 0.07, 13, 101


def expected(kind: str, step: int, decay_steps: int = 30) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / (TOTAL - WARMUP)
    if kind == "constant":
        return PEAK
    if kind == "cosine":
        return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)
    if kind == "wsd":
        done = max(0.0, (step - (TOTAL - decay_steps)) / decay_steps)
    return PEAK * (1 - done * (1 - FINAL))


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_every_step_equals_the_closed_form(kind):
    config = ScheduleConfig(
        kind=kind,
        learning_rate=PEAK,
        warmup_steps=WARMUP,
        final_fraction=FINAL,
        decay_fraction=0.3,  # 30.3 steps, rounded to 30
    )
    steps = np.arange(TOTAL + 1)
    got = jax.vmap(make_schedule(config, TOTAL))(steps)
    np.testing.assert_allclose(got, [expected(kind, int(s)) for s in steps], rtol=3e-6)
    at_once = make_schedule(config.model_copy(update={"warmup_steps": 0}), TOTAL)
    assert float(at_once(0)) == pytest.approx(PEAK)
    assert float(at_once(TOTAL)) == pytest.approx(
        PEAK * (1 if kind == "constant" else FINAL)
    )


def test_warmup_or_decay_longer_than_the_run_is_refused():
    assert message(make_schedule, ScheduleConfig(warmup_steps=200), 100) == (
        "schedule: warmup_steps=200 is longer than the run of 100 steps; "
        "set warmup_steps to 100 or less, or train for longer"
    )
    config = ScheduleConfig(kind="wsd", warmup_steps=60, decay_fraction=0.5)
    assert message(make_schedule, config, 100) == (
        "schedule: warmup_steps=60 and a decay of 50 steps are longer than the run of "
        "100 steps; "
        "lower warmup_steps or decay_fraction"
    )
