"""What layers read beside the residual stream: keys of earlier layers, inputs of their
own; and several streams. In a scan they equal the layers one by one, on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.params import Params, bind, flatten_names
from maxlm.parallel.config import ParallelConfig
from maxlm.run.model_placement import describe_pipeline_obstacle
from maxlm.sharding import ShardingConfig
from tests.models.building import QUICK, placed_params, rows
from tests.models.layer_walk import apply_layers_one_by_one

SIZES = {
    "vocab_size": 32,
    "d_model": 14,
    "max_seq_len": 64,
    "num_layers": 8,
    "tie_embeddings": True,
}
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "value_norm": True}
KINDS: dict[str, dict[str, Any]] = {
    "near": {"window": 4},
    "far": {"positions": {"kind": "rope", "theta": 500.0}},
    "near_shared": {"window": 4, "keys_of": "near", "mlp": {"d_ff": 10}},
    "far_shared": {
        "positions": {"kind": "rope", "theta": 500.0},
        "keys_of": "far",
    },
}
ALTUP = {"kind": "altup", "num_streams": 3, "active": 1, "laurel_rank": 5}
INPUTS = {"width": 6, "vocab_size": 24}
LENGTH = 12


def make_config(pattern, **changes: Any) -> DecoderConfig:
    kinds = {name: KINDS[name] for name in dict.fromkeys(pattern)}
    settings = {
        **SIZES,
        "attention": ATTENTION,
        "mlp": {"d_ff": 18, "sparsity": 0.3},
        "kinds": kinds,
        "pattern": pattern,
    }
    return DecoderConfig.model_validate(settings | changes)


PERIODS = make_config(["near", "far", "near_shared", "far_shared"])
GEMMA = make_config(
    ["near", "far", "near", "far", "near_shared", "far_shared"],
    num_layers=6,
    block=ALTUP,
    layer_inputs=INPUTS,
    layer_scale=True,
    placement="sandwich",
)
# Two periods of a kind that makes keys and one that reads them: the least that a scan
# carries keys between.
SMALL = make_config(
    ["near", "near_shared"],
    num_layers=4,
    block=ALTUP | {"num_streams": 2},
    layer_inputs=INPUTS,
    layer_scale=True,
    placement="sandwich",
)
# The first reader of keys takes those of another scan, the others those of their own.
DENSE_FIRST = make_config(
    ["near", "near_shared"],
    num_layers=5,
    dense_layers=1,
    kinds={"near": KINDS["near"], "near_shared": {"window": 4, "keys_of": "near"}},
    moe={"num_experts": 4, "experts_per_token": 2, "d_ff": 10},
    layer_inputs=INPUTS,
)


def make_model(config, mesh) -> Decoder:
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    parallel = ParallelConfig(balance_sequence=False)
    return Decoder(config, rules=rules, dtype=jnp.float32, parallel=parallel)


def make_rows(mesh) -> list[jax.Array]:
    """Tokens, positions and segment ids; the second row has two documents."""
    tokens = np.random.default_rng(1).integers(0, 32, (2, LENGTH), dtype=np.int32)
    positions = np.array([[*range(12)], [*range(5), *range(7)]], np.int32)
    segments = np.array([[1] * 12, [1] * 5 + [2] * 7], np.int32)
    return rows(mesh, tokens, positions, segments)


def differentiate(model: Decoder, params: Params, arrays, *, one_by_one: bool = False):
    """Returns a loss of the hidden states, and its gradients by name."""
    weights = np.random.default_rng(2).normal(size=(2, LENGTH, 14)).astype(np.float32)

    def compute_loss(params, tokens, positions, segments):
        if one_by_one:
            hidden = apply_layers_one_by_one(model, params, tokens, positions, segments)
        else:
            hidden, _ = bind(model, params)(tokens, positions, segments)
        return jnp.sum(hidden * weights)

    step = jax.value_and_grad(compute_loss)
    if not one_by_one:
        step = jax.jit(step, compiler_options=QUICK)
    loss, gradients = step(params, *arrays)
    gradients = {
        name: np.asarray(value) for name, value in flatten_names(gradients).items()
    }
    return float(loss), gradients


def assert_same(left, right) -> None:
    loss, gradients = left
    expected_loss, expected = right
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-4)
    assert gradients.keys() == expected.keys()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        # Of a scalar the gradient is a sum whose terms nearly cancel.
        atol = 1e-4 * np.abs(gradient).max() + 1e-6 * largest
        np.testing.assert_allclose(
            gradients[name], gradient, rtol=1e-3, atol=atol, err_msg=name
        )


@pytest.mark.heavy
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SMALL, id="small"),
        pytest.param(GEMMA, id="gemma", marks=pytest.mark.more),
        pytest.param(PERIODS, id="periods", marks=pytest.mark.more),
        pytest.param(DENSE_FIRST, id="dense_first", marks=pytest.mark.more),
    ],
)
def test_a_scan_equals_the_layers_one_by_one(one_device_mesh, config):
    mesh = one_device_mesh
    with jax.set_mesh(mesh):
        model = make_model(config, mesh)
        params = placed_params(config, mesh)
        arrays = make_rows(mesh)
        result = differentiate(model, params, arrays)
        assert_same(result, differentiate(model, params, arrays, one_by_one=True))
    _, gradients = result
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 0, name
    if config.layer_inputs is not None:
        # Tokens beyond the table read its row 0; what no token names has no gradient.
        table = gradients["layer_inputs.embedding.table"]
        tokens = np.asarray(arrays[0])
        is_read = {*np.where(tokens < 24, tokens, 0).ravel().tolist()}
        assert {*np.flatnonzero(np.abs(table).max(1)).tolist()} == is_read


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"context": 2}])
def test_a_mesh_changes_nothing(mesh, axes):
    results = []
    for devices in (mesh(), mesh(**axes)):
        with jax.set_mesh(devices):
            model = make_model(GEMMA, devices)
            params = placed_params(GEMMA, devices)
            results.append(differentiate(model, params, make_rows(devices)))
    assert_same(*results)


LISTED = make_config(
    ["near", "far"] * 4 + ["near_shared", "far_shared"] * 3, num_layers=14
)


@pytest.mark.parametrize(
    ("config", "periods", "num_arrays"), [(PERIODS, 2, 4), (LISTED, 3, 0)]
)
def test_only_layers_that_read_keys_of_their_scan_keep_them(
    one_device_mesh, config, periods, num_arrays
):
    """Of arrays with an axis of periods, a scan for the backward pass stacks keys and
    values of the two readers of a period; of those that make them, none, and none that
    another scan has made."""
    mesh = one_device_mesh
    with jax.set_mesh(mesh):
        model = make_model(config, mesh)
        params = placed_params(config, mesh)

        def compute_loss(params, *arrays):
            hidden, _ = bind(model, params)(*arrays)
            return jnp.sum(hidden)

        jaxpr = jax.make_jaxpr(jax.grad(compute_loss))(params, *make_rows(mesh))
    keys_shape = (periods, 2, LENGTH, 2, 6)
    scans = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
    counts = [
        sum(variable.aval.shape == keys_shape for variable in scan.outvars)
        for scan in scans
    ]
    assert max(counts) == num_arrays


CANNOT_BE = {
    "window": (
        {"near_shared": {"window": 5, "keys_of": "near"}},
        "kinds.near_shared.keys_of: near has another window than this kind; give both "
        "the same window",
    ),
    "heads": (
        {
            "near_shared": {
                "window": 4,
                "keys_of": "near",
                "attention": ATTENTION | {"num_kv_heads": 1},
            }
        },
        "near has other kv heads than this kind reads; give both the same num_kv_heads, "
        "head_dim and chunk",
    ),
    "positions": (
        {"near_shared": KINDS["far_shared"] | {"keys_of": "near", "window": 4}},
        "near has other positions than this kind; give both the same positions",
    ),
    "order": (
        {"near_shared": KINDS["near_shared"] | {"keys_of": "near_shared"}},
        "no layer of kind near_shared stands before; name a kind of layers that stand "
        "before it and make keys",
    ),
    "no kind": (
        {"near_shared": KINDS["near_shared"] | {"keys_of": "neer"}},
        "kinds.near_shared.keys_of: neer is not among kinds; did you mean near?",
    ),
}


@pytest.mark.parametrize("name", CANNOT_BE)
def test_keys_that_cannot_be_read_are_one_line(name):
    kinds, expected = CANNOT_BE[name]
    with pytest.raises(MaxlmError) as caught:
        make_config(["near", "near_shared"], kinds={"near": KINDS["near"]} | kinds)
    message = str(caught.value)
    assert expected in message


def test_streams_that_cannot_be_are_one_line():
    with pytest.raises(MaxlmError, match="active=3 of num_streams=3, counted from 0; "):
        make_config(["near"], block=ALTUP | {"active": 3})
    config = make_config(["near"], block=ALTUP, placement="post")
    with pytest.raises(MaxlmError, match=r"block\.kind=altup in layers without "):
        config.build(rules=ShardingConfig().compute, dtype=jnp.float32)


def test_pipelines_refuse_what_layers_read_beside_the_stream():
    with_inputs = make_config(["near"], layer_inputs=INPUTS)
    assert describe_pipeline_obstacle(with_inputs) == (
        "each reads its part of model.layer_inputs"
    )
    assert describe_pipeline_obstacle(PERIODS) == (
        "some read keys of others (model.kinds.*.keys_of)"
    )
    assert describe_pipeline_obstacle(make_config(["near"])) is None
