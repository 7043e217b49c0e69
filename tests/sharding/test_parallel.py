"""Data, fully sharded and tensor parallelism on eight devices give one device's numbers, and no
device ever holds a whole sharded parameter."""

import re

import jax
import numpy as np
import pytest

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.params import bind, flatten_names, init_params, param_specs
from maxlm.sharding import jit_sharded
from tests.models import building
from tests.models.building import QUICK

CONFIG = DecoderConfig.model_validate(
    {
        "vocab_size": 46,
        "num_layers": 3,
        "d_model": 24,
        "max_seq_len": 16,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "bias": True},
        "mlp": {"d_ff": 34},
        "norm": {"kind": "layernorm", "bias": True},
    }
)
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2, "data": 4},
    "all": {"fsdp": 2, "tensor": 2, "data": 2},
}


def batch(mesh, seed=1):
    """8 rows of 9 tokens, packed and padded at places of their own."""
    shape = (8, 9)
    tokens, targets, weights = building.tokens_and_targets(CONFIG.vocab_size, shape, seed)
    cut, stop = np.arange(8)[:, None] + 1, 10 - np.arange(8)[:, None] // 2
    at = np.broadcast_to(np.arange(9), shape)
    segments = np.where(at < stop, 1 + (at >= cut), 0).astype(np.int32)
    positions = np.where(at < cut, at, at - cut).astype(np.int32)
    names = ("tokens", "positions", "segments", "targets", "weights")
    arrays = building.rows(mesh, tokens, positions, segments, targets, weights * (segments > 0))
    return dict(zip(names, arrays, strict=True))


def compiled_step(mesh):
    """The compiled loss-and-gradients, its arguments, and the gradients' shardings."""
    model, shardings = building.decoder(CONFIG, mesh), building.storage(CONFIG, mesh)
    params = building.on_devices(building.random_params(CONFIG, mesh), shardings)
    arguments = (params, batch(mesh))
    step = jax.jit(jax.value_and_grad(lambda p, b: building.loss(model, p, b)[0]))
    return step.lower(*arguments).compile(compiler_options=QUICK), arguments, shardings


@pytest.fixture(scope="module")
def expected(one_device_mesh):
    with jax.set_mesh(one_device_mesh):
        step, arguments, _ = compiled_step(one_device_mesh)
        return jax.device_get(step(*arguments))


@pytest.fixture(scope="module", params=MESHES)
def parallel(request, mesh):
    axes = mesh(**MESHES[request.param])
    with jax.set_mesh(axes):
        step, arguments, shardings = compiled_step(axes)
        return request.param, step.as_text(), step(*arguments), shardings


def test_loss_and_gradients_equal_one_devices(parallel, expected):
    _, _, (loss, grads), _ = parallel
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-6)
    wanted = flatten_names(expected[1])
    for name, grad in flatten_names(grads).items():
        error = np.abs(np.asarray(grad) - wanted[name]).max()
        # A key's bias moves all scores of a query alike: its true gradient is nought.
        assert error <= 1e-5 * max(np.abs(wanted[name]).max(), 1), name


def test_gradients_lie_as_their_parameters_do(parallel):
    _, _, (_, grads), shardings = parallel
    jax.tree.map(lambda g, s: np.testing.assert_equal(g.sharding.spec, s.spec), grads, shardings)


def test_each_parallelism_communicates_as_it_should(parallel):
    """Gradients are summed everywhere; only fsdp gathers weights, each matrix of a layer once or
    more inside the layers' loop."""
    name, hlo, _, _ = parallel
    assert re.search(r" (?:all-reduce|reduce-scatter)(?:-start)?\(", hlo)
    gathered = re.findall(r" = (.*) all-gather(?:-start)?\(.*", hlo)
    if name == "data":
        assert not gathered
    if name == "fsdp":
        kinds = set(re.findall(r"f32\[[\d,]+\]", " ".join(gathered)))
        query, key, mlp = {"f32[24,4,6]"}, {"f32[24,2,6]"}, {"f32[24,34]"}
        assert query | key | mlp <= kinds


@pytest.fixture(scope="module")
def created(mesh):
    """Initialisation in place on eight devices: compiled, and its result."""
    axes = mesh(fsdp=4, tensor=2)
    with jax.set_mesh(axes):
        specs = param_specs(building.decoder(CONFIG, axes))
        shardings = building.storage(CONFIG, axes)
        start = jit_sharded(lambda key: init_params(specs, key), shardings)
        compiled = start.lower(jax.random.key(3)).compile(compiler_options=QUICK)
        return specs, compiled, compiled(jax.random.key(3))


def test_initial_values_do_not_depend_on_the_mesh(created, one_device_mesh):
    specs, _, params = created
    with jax.set_mesh(one_device_mesh):
        alone = jax.jit(lambda key: init_params(specs, key), compiler_options=QUICK)(
            jax.random.key(3)
        )
    for name, value in flatten_names(alone).items():
        np.testing.assert_allclose(flatten_names(params)[name], value, rtol=1e-4, atol=1e-7)


def test_parameters_are_born_in_their_shards(created, mesh):
    """No instruction of the program that makes them has a whole sharded parameter's size."""
    specs, compiled, params = created
    shardings = flatten_names(building.storage(CONFIG, mesh(fsdp=4, tensor=2)))
    split = {}
    for name, value in flatten_names(params).items():
        assert value.sharding == shardings[name], name
        shard = value.addressable_shards[0].data
        if any(shardings[name].spec):
            assert shard.size < value.size, name
            split[name] = value
    layers = CONFIG.num_layers
    assert {"layers.mlp.up.kernel", "embedding.table", "head.kernel"} <= set(split)
    sizes = {
        int(np.prod([int(n) for n in dims.split(",")]))
        for dims in re.findall(r"\b[a-z]\w*\[([\d,]+)\]", compiled.as_text())
    }
    for name, value in split.items():
        if name.endswith(("kernel", "table")):
            assert not {value.size, value.size // layers} & sizes, name

    memory = compiled.memory_analysis()
    whole = sum(spec.nbytes for spec in flatten_names(specs).values())
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 2


@pytest.mark.parametrize("bad", [-1, CONFIG.vocab_size])
def test_ids_out_of_range_give_nan_in_a_split_table_too(mesh, bad):
    axes = mesh(tensor=2)
    ids = np.array([[0, bad, CONFIG.vocab_size - 1]], np.int32)
    with jax.set_mesh(axes):
        model = building.decoder(CONFIG, axes)
        values = building.random_params(CONFIG, axes)
        params = building.on_devices(values, building.storage(CONFIG, axes))
        found = jax.jit(lambda p, ids: bind(model, p).embedding(ids))(
            params, *building.rows(axes, ids)
        )
    table = values["embedding"]["table"].astype(np.float32)
    np.testing.assert_array_equal(found[0], [table[0], np.full(24, np.nan), table[-1]])
