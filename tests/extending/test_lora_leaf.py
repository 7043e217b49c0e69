"""LoRA as an external package writes it: a leaf class, and an adapter from specs to
specs."""

import json
import shutil
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.adapters import ADAPTERS
from maxlm.checkpoint.reading import read_metadata
from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.models.adapters import Adapter
from maxlm.models.params import (
    GatheredParam,
    Leaf,
    ParamReader,
    Params,
    ParamSpec,
    ShardedWeight,
    bind,
    bind_specs,
    flatten_names,
    init_params,
    param_specs,
    replace_base_params,
    select_base_params,
    truncated_normal,
)
from maxlm.plan.predict import plan_run
from maxlm.run.config import RunConfig
from maxlm.run.load import load_run
from maxlm.run.setup import set_up_run
from maxlm.run.warm_start import init_or_warm_start_state
from maxlm.sharding import AxisRules
from maxlm.train.program import train_model
from tests.models.building import LLAMA_GQA
from tests.train import tiny

RANK, SCALE = 4, 0.7


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora(Leaf):
    """``x · base + scale · (x · A) · B`` (Hu et al. 2021, arXiv 2106.09685, §4.1)."""

    base_field: ClassVar[str] = "base"

    base: Any
    lora_a: Any
    lora_b: Any
    scale: float = field(metadata={"static": True})

    def read_kernel(self, use: ParamReader) -> ShardedWeight:
        return use.read(self.base)

    def finish_product(self, y: jax.Array, x: jax.Array, use: ParamReader) -> jax.Array:
        (h,) = use.multiply(x, use.read(self.lora_a, (*use.input_axes, None)))
        (added,) = use.multiply(h, use.read(self.lora_b, (None, *use.output_axes)))
        return y + self.scale * added


@ADAPTERS.register("test_lora")
class MinimalLora(Adapter):
    """Every hidden matrix outside experts gains A and B."""

    kind: Literal["test_lora"] = "test_lora"
    rank: int = RANK
    scale: float = SCALE

    def adapt(self, specs: Params) -> Params:
        return jax.tree.map(self._adapt_one, specs)

    def _adapt_one(self, spec: ParamSpec) -> Any:
        if spec.role != "matrix" or "expert" in spec.axes:
            return spec
        lead = spec.num_layer_axes
        inputs = spec.num_layer_axes + len(spec.contracting_dims)
        a = replace(
            spec,
            shape=(*spec.shape[:inputs], self.rank),
            axes=(*spec.axes[:inputs], None),
            init=truncated_normal(0.1),
        )
        b = replace(
            spec,
            shape=(*spec.shape[:lead], self.rank, *spec.shape[inputs:]),
            axes=(*spec.axes[:lead], None, *spec.axes[inputs:]),
            contracting_dims=(lead,),
            init=jax.nn.initializers.zeros,
        )
        return Lora(spec, a, b, self.scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(Leaf):
    """A matrix of integers, as another run's base may be read into it."""

    base_field: ClassVar[str] = "values"

    values: Any

    def materialize(self, use: ParamReader) -> ShardedWeight:
        return use.read(self.values)


@ADAPTERS.register("test_int8")
class Int8Adapter(Adapter):
    """Makes every hidden matrix one of integers, and says nothing of how they come from
    floats."""

    kind: Literal["test_int8"] = "test_int8"

    def adapt(self, specs: Params) -> Params:
        return jax.tree.map(self._adapt_one, specs)

    def _adapt_one(self, spec: ParamSpec) -> Any:
        if spec.role != "matrix":
            return spec
        return Int8(replace(spec, dtype=jnp.int8, init=jax.nn.initializers.zeros))


CONFIG = LLAMA_GQA.model_copy(
    update={
        "attention": LLAMA_GQA.attention.model_copy(update={"bias": True}),
        "remat": "matmuls",
    }
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 11)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), (2, 11))


@pytest.fixture
def models():
    """The base model and the adapted one, with parameters that have the base's in
    common."""
    with jax.set_mesh(
        jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,))
    ):
        base = CONFIG.build(rules=AxisRules(), dtype=jnp.float32)
        specs = param_specs(base)
        adapted = bind_specs(base, MinimalLora().adapt(specs))
        params = init_params(specs, jax.random.key(0))
        fresh = init_params(param_specs(adapted), jax.random.key(1))
        yield base, adapted, params, replace_base_params(fresh, params)


@jax.jit(static_argnums=0)
def hidden(model: Any, params: Any) -> jax.Array:
    return bind(model, params)(TOKENS, POSITIONS)[0]


def test_arrays_have_canonical_names_and_specs_of_their_own(models):
    _, adapted, _, joined = models
    specs = flatten_names(param_specs(adapted))
    values = flatten_names(joined)
    shapes = {name: value.shape for name, value in values.items()}
    assert {name: spec.shape for name, spec in specs.items()} == shapes
    kernel = "layers.attention.query.kernel"
    names = [name for name in specs if name.startswith(kernel)]
    assert names == [f"{kernel}.base", f"{kernel}.lora_a", f"{kernel}.lora_b"]
    assert specs[f"{kernel}.lora_b"].axes == ("layers", None, "heads", "head_dim")


@pytest.mark.heavy
def test_the_forward_pass_is_that_of_merged_matrices(models):
    base, adapted, _, joined = models
    noisy = jax.tree.map(lambda x: x + 0.05, joined)

    def merge(leaf: Any) -> Any:
        if not isinstance(leaf, Lora):
            return leaf
        layers = leaf.base.shape[0]
        num_inputs = prod(leaf.lora_a.shape[1:-1])
        num_outputs = prod(leaf.lora_b.shape[2:])
        a = leaf.lora_a.reshape(layers, num_inputs, RANK)
        b = leaf.lora_b.reshape(layers, RANK, num_outputs)
        product = jnp.einsum("lir,lro->lio", a, b)
        return leaf.base + SCALE * product.reshape(leaf.base.shape)

    merged = jax.tree.map(merge, noisy, is_leaf=lambda x: isinstance(x, Lora))
    np.testing.assert_allclose(
        hidden(adapted, noisy), hidden(base, merged), rtol=2e-5, atol=2e-5
    )


def test_a_gathered_array_of_a_leaf_lies_as_its_own_axes_say(mesh):
    """Under ZeRO-2 A of [embed, rank] has not the layout of the kernel's last two
    dimensions."""
    axes = ("embed", "heads", "head_dim")
    spec = ParamSpec((8, 4, 6), axes, jax.nn.initializers.zeros, "matrix", (0,))
    use = ParamReader(spec, AxisRules(heads=("tensor",)), jnp.float32)
    with jax.set_mesh(mesh(tensor=2)):
        a = jnp.zeros((8, RANK))
        assert use.read(GatheredParam(a, a), ("embed", None)).compute_layout == ((), ())


@pytest.fixture
def make_config(tmp_path):
    """``make_config(name, mesh, train, **parts)``: a run's config."""
    text = tiny.write_text(tmp_path / "text")

    def make(
        name: str, mesh: dict[str, int], train: dict[str, Any], **parts: Any
    ) -> RunConfig:
        settings = tiny.settings(tmp_path, text) | {"name": name, "mesh": mesh}
        settings["data"]["heldout_fraction"] = 0
        settings |= {"train": train, "checkpoint": {"every_steps": 2}}
        settings |= {
            "sharding": {"max_unsharded": 1},
            "reporting": {"tensorboard": False},
        }
        return RunConfig.model_validate(settings | parts)

    return make


def train(config: RunConfig) -> Any:
    return train_model(config, say=lambda _: None)


def read_first_loss(result: Any) -> float:
    return json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])[
        "loss"
    ]


def are_equal(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.more
@pytest.mark.usefixtures("compiled_once")
def test_a_run_trains_a_and_b_alone_beside_the_base_that_it_starts_from(make_config):
    mesh = {"fsdp": 4, "tensor": 2}
    base = train(make_config("base", mesh, {"steps": 2}))
    start = {"start_from": str(base.folder)}
    adapter = {"kind": "test_lora"}
    whole = train(make_config("whole", mesh, {"steps": 4, **start}, adapter=adapter))

    # The first step has the loss of the base, bit for bit.
    going_on = train(make_config("going_on", mesh, {"steps": 1, **start}))
    assert read_first_loss(whole) == read_first_loss(going_on)

    # The base stays as it was; A and B do not.
    assert are_equal(select_base_params(whole.state.params), base.state.params)
    trained = {
        n: x for n, x in flatten_names(whole.state.params).items() if ".lora_" in n
    }
    assert len(trained) == 14
    assert all(np.any(x) for x in trained.values())  # B began as zeros

    # The optimizer and its checkpoint have arrays for A and B alone, under canonical
    # names.
    moments = [n for n, x in flatten_names(whole.state.opt_state).items() if x.ndim]
    assert {name.split(".", 2)[2] for name in moments} == set(trained)
    saved = read_metadata(whole.folder / "checkpoints" / "4")["fingerprints"]
    assert {
        n.split(".", 3)[3] for n in saved if n.startswith("opt_state.1.mu.")
    } == set(trained)
    assert "params.layers.attention.query.kernel.base" in saved

    # It resumes as if it had never stopped.
    other = shutil.copytree(whole.folder, whole.folder.with_name("cut"))
    shutil.rmtree(other / "checkpoints" / "4")
    cut = train(make_config("cut", mesh, {"steps": 4, **start}, adapter=adapter))
    assert cut.start_step == 2
    assert are_equal(whole.state, cut.state)

    # A run that starts from an adapted one has its A and B too.
    assert are_equal(load_run(whole.folder).params, whole.state.params)
    again = {"steps": 1, "start_from": str(whole.folder)}
    setup = set_up_run(make_config("again", mesh, again, adapter=adapter))
    assert are_equal(init_or_warm_start_state(setup).params, whole.state.params)


@pytest.mark.heavy
@pytest.mark.usefixtures("compiled_once")
def test_a_float_base_is_not_cast_into_a_leaf_of_integers(make_config):
    base = train(make_config("base", {"fsdp": -1}, {"steps": 1}))
    start = {"steps": 1, "start_from": str(base.folder), "trainable": ["*norm*"]}
    with pytest.raises(MaxlmError) as caught:
        train(make_config("whole", {"fsdp": -1}, start, adapter={"kind": "test_int8"}))
    assert str(caught.value) == (
        f"{base.folder}/checkpoints/1: params.layers.attention.key.kernel is float32 "
        f"in it, int8 "
        "in this run, and a cast would lose its values; use a checkpoint that holds it "
        "so (of a "
        "run with the same leaf), or the config without it"
    )
    assert not base.folder.with_name("whole").exists()


def test_the_plan_counts_no_gradients_and_no_optimizer_for_the_base(make_config):
    axes = ("data", "fsdp", "expert", "tensor", "context", "stage")
    sizes: dict[str, int] = dict.fromkeys(axes, 1)
    base = plan_run(make_config("a", sizes, {"steps": 1}), sizes=sizes)
    config = make_config("a", sizes, {"steps": 1}, adapter={"kind": "test_lora"})
    plan = plan_run(config, sizes=sizes)
    added = {r.path: r.bytes_total for r in plan.layout.rows if ".lora_" in r.path}
    total = sum(added.values())
    assert plan.memory.parameters == base.memory.parameters + total
    assert plan.layout.gradient_bytes == total
    assert plan.memory.optimizer == pytest.approx(2 * total, abs=16)
    assert plan.memory.gradients < base.memory.gradients / 2


def test_its_config_reads_back_and_unknown_kinds_are_refused(make_config, tmp_path):
    config = make_config(
        "a", {"fsdp": 1}, {"steps": 1}, adapter={"kind": "test_lora", "rank": 2}
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(RunConfig, tmp_path / "config.yaml").value == config
    with pytest.raises(MaxlmError, match=r"adapter.kind must be one of .*'test_lora'"):
        load_config(RunConfig, tmp_path / "config.yaml", ["adapter.kind=none_such"])
