"""A diagonal state-space mixer with a recurrent cache, as an external package writes it."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from maxlm.config import Config
from maxlm.inference.decode import decode, prefill
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.blocks import register_mixer
from maxlm.models.caches import CacheArraySpec
from maxlm.models.costs import LayerCosts, group_matrices
from maxlm.models.layers.linear import Linear, project
from maxlm.models.params import (
    bind,
    declare,
    flatten_names,
    init_params,
    materialize,
    param_specs,
)
from maxlm.plan.predict import Machine, plan_run
from maxlm.plan.timing import count_extra_forward_flops
from maxlm.plan.workload import count_cache_bytes
from maxlm.programs.smoke import shrink_config
from maxlm.programs.train import train_model
from maxlm.run import RunConfig
from maxlm.sharding import AxisRules
from tests.models.building import LLAMA_GQA
from tests.plan.test_against_compiled import compiled, products, sent
from tests.programs import tiny

WIDTH = 10


class DiagonalSsmConfig(Config):
    kind: Literal["diagonal_ssm"] = "diagonal_ssm"
    width: int = WIDTH


class StateCache(NamedTuple):
    state: Any
    """fp32 [B, F]."""


class DiagonalSsm(nnx.Module):
    """``h[t] = a · h[t-1] + (1 - a) · up(x[t])``, ``y = out(h · silu(gate(x)))``."""

    name = "ssm"

    def __init__(self, config, norm, d_model, num_layers, init_std, *, rules, dtype, parallel):
        del norm, num_layers, parallel
        self.width, self.rules = config.width, rules
        kw: dict[str, Any] = {"bias": False, "std": init_std, "rules": rules, "dtype": dtype}
        outer, inner = {"embed": d_model}, {"mlp": config.width}
        self.up, self.gate = Linear(outer, inner, **kw), Linear(outer, inner, **kw)
        self.out = Linear(inner, outer, **kw)
        self.decay = declare((config.width,), ("mlp",), jax.nn.initializers.ones, "vector")

    def __call__(self, x, inputs, cache):
        up, gate = project(x, self.up, self.gate)
        decay = jax.nn.sigmoid(materialize(self.decay, self.rules, jnp.float32))
        live = jnp.ones(up.shape[:2], bool)
        if inputs.lengths is not None:
            live = inputs.positions < inputs.lengths[:, None]

        def step(state, token):
            value, live = token
            new = decay * state + (1 - decay) * value.astype(jnp.float32)
            state = jnp.where(live[:, None], new, state)
            return state, state

        start = jnp.zeros_like(up[:, 0], jnp.float32) if cache is None else cache.state
        last, states = lax.scan(step, start, (up.swapaxes(0, 1), live.T))
        y = states.swapaxes(0, 1).astype(up.dtype) * jax.nn.silu(gate)
        return self.out(y, seq_axis="residual"), None if cache is None else StateCache(last)

    def cache_spec(self, batch, length, window):
        return StateCache(CacheArraySpec((batch, self.width), ("batch", "mlp"), jnp.float32))

    def costs(self):
        return LayerCosts(group_matrices(self), extra_flops=3 * self.width, flops_axes=("mlp",))


register_mixer(DiagonalSsmConfig, DiagonalSsm)

MIXER = {"kind": "diagonal_ssm", "width": WIDTH}
OWN = {"attention": None, "mixer": MIXER, "positions": {"kind": "none"}, "init_std": 0.4}
CONFIG = DecoderConfig.model_validate(LLAMA_GQA.model_dump() | OWN)


@pytest.fixture
def model():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield CONFIG.build(rules=AxisRules(), dtype=jnp.float32)


def test_its_config_reads_back_and_its_parameters_are_declared(model):
    assert DecoderConfig.model_validate(CONFIG.model_dump()) == CONFIG
    assert isinstance(CONFIG.mixer, DiagonalSsmConfig)
    names = [n for n in flatten_names(param_specs(model)) if n.startswith("layers.ssm.")]
    assert names == [f"layers.ssm.{n}" for n in ("decay", "gate.kernel", "out.kernel", "up.kernel")]


def test_cached_decoding_equals_the_full_forward_pass(model):
    """Rows of unequal length, padded on the right: padding leaves the state as it was."""
    params = jax.jit(lambda: init_params(param_specs(model), jax.random.key(0)))()
    texts = np.random.default_rng(0).integers(0, 31, (3, 20)).astype(np.int32)
    lengths = np.array([1, 9, 6], np.int32)
    places = np.broadcast_to(np.arange(20, dtype=np.int32), texts.shape)

    @jax.jit
    def read(params):
        bound = bind(model, params)
        return bound.logits(bound(texts, places)[0])

    full = read(params)
    start = jax.jit(lambda p, t, n: prefill(model, p, t, n, cache_length=24))
    logits, cache = start(params, np.where(places < lengths[:, None], texts, 7)[:, :10], lengths)
    assert {x.shape for x in jax.tree.leaves(cache)} == {(3, 3, WIDTH)}  # whatever the length
    step = jax.jit(lambda p, t, i, c: decode(model, p, t, i, c))
    rows = np.arange(3)
    for _ in range(8):
        np.testing.assert_allclose(logits, full[rows, lengths - 1], rtol=0, atol=1e-5)
        logits, cache = step(params, texts[rows, lengths], lengths, cache)
        lengths = lengths + 1


LAYERS, D, FF, F, VOCAB, SEQ = 2, 32, 64, 16, 304, 32


def make_run(folder: Path, **top: Any) -> RunConfig:
    settings = tiny.settings(folder, str(folder / "text"))
    settings["data"]["heldout_fraction"] = 0
    own = {"mixer": {"kind": "diagonal_ssm", "width": F}, "positions": {"kind": "none"}}
    settings["model"] = {**settings["model"], "attention": None, **own}
    return RunConfig.model_validate({**settings, "optimizer": {"kind": "adamw"}, **top})


@pytest.mark.parametrize("stated", [True, False])
def test_the_plan_counts_its_parameters_flops_and_cache(stated, tmp_path, monkeypatch):
    """A mixer that states no costs is counted by its matrices."""
    if not stated:
        monkeypatch.delattr(DiagonalSsm, "costs")
    matrices, norms = LAYERS * (3 * D * F + 3 * D * FF), (2 * LAYERS + 1) * D
    plan = plan_run(make_run(tmp_path), Machine.from_name("h100x1"))
    assert plan.layout.parameters == matrices + norms + LAYERS * F + 2 * VOCAB * D
    recurrence = LAYERS * 3 * F if stated else 0
    assert plan.layout.flops_per_token == 6 * (matrices + VOCAB * D) + 3 * recurrence
    assert count_extra_forward_flops(plan.shape) == recurrence * 8 * SEQ
    assert "ssm: gate, up" in [group.name for group in plan.shape.work.matmul_layer_counts]
    assert "a layer's mixer" in plan.memory.working_sets
    assert (plan.step_seconds or 0) > 0
    model: Any = make_run(tmp_path).model.build(rules=AxisRules(), dtype=jnp.bfloat16)
    for length in (7, 4096):
        assert count_cache_bytes(model, 5, length) == LAYERS * 5 * F * 4


@pytest.mark.usefixtures("compiled_once")
def test_the_plan_counts_what_the_compiled_step_multiplies_and_sends(tmp_path):
    shape, cost, _ = compiled(make_run(tmp_path, mesh={"fsdp": 4, "tensor": 2}))
    assert products(shape) == cost.matmul_flops
    ours, theirs = sent(shape), cost.wire_by_kind_and_axes()
    for key, size in theirs.items():
        if size > 0.1 * sum(theirs.values()):
            assert ours[key] == pytest.approx(size, rel=0.03), key


@pytest.mark.usefixtures("compiled_once")
def test_it_trains_and_resumes_as_any_model_does(tmp_path):
    tiny.write_text(tmp_path / "text")
    how = {"mesh": {"fsdp": 4, "tensor": 2}, "reporting": {"tensorboard": False}}
    short, long = (make_run(tmp_path, train={"steps": steps}, **how) for steps in (2, 4))
    assert train_model(short, say=lambda _: None).start_step == 0
    again = train_model(long, say=lambda _: None)
    assert (again.start_step, int(again.state.step)) == (2, 4)
    saved = (again.folder / "config.yaml").read_text()
    assert "diagonal_ssm" in saved


def test_its_run_shrinks_to_a_small_one_for_a_smoke_test(tmp_path):
    model = shrink_config(make_run(tmp_path), 8).model
    assert (model.attention, model.mixer) == (None, DiagonalSsmConfig(width=F))
