"""A convolution and a scan over rows that are split over devices, in order and in
balanced order, equal those of one device, and so do their gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from maxlm.parallel.causal_conv import sharded_causal_conv
from maxlm.parallel.context import sequence_order_indices
from maxlm.parallel.local import SplitArray
from maxlm.parallel.selective_scan import (
    SelectiveScanInputs,
    sharded_selective_scan,
)
from maxlm.sharding.rules import ComputeRules
from tests.models.building import QUICK

B, S, F, N, W = 2, 32, 12, 3, 4
AXES = SelectiveScanInputs(
    x=("batch", "seq", "mlp"),
    dt=("batch", "seq", "mlp"),
    B=("batch", "seq", None),
    C=("batch", "seq", None),
    A_log=("mlp", None),
    D=("mlp",),
    dt_bias=("mlp",),
)
SHAPES = SelectiveScanInputs(
    (B, S, F), (B, S, F), (B, S, N), (B, S, N), (F, N), (F,), (F,)
)
# Row 0: documents of one token to several runs, and padding. Row 1: one document.
SEGMENTS = np.array([[1] * 2 + [2] + [3] * 17 + [4] * 9 + [0] * 3, [1] * S], np.int32)


def compute(rules, inputs, weight, segment_ids, *, balanced):
    """(loss, y) of the scan of a convolution; the loss reads every y differently."""
    x = sharded_causal_conv(
        SplitArray(inputs.x, ("mlp",)),
        weight,
        rules=rules,
        segment_ids=segment_ids,
        balanced=balanced,
        activation="silu",
    )
    y = sharded_selective_scan(
        inputs._replace(x=x),
        rules=rules,
        feature_axis="mlp",
        segment_ids=segment_ids,
        balanced=balanced,
    )
    return jnp.sum(jnp.sin(y)), y


def run(mesh, inputs, weight, segment_ids, balanced):
    """y and gradients by name, tokens in sequence order."""
    rules = ComputeRules().for_mesh(dict(mesh.shape))
    num_shards = mesh.shape["context"]
    order = sequence_order_indices(S, num_shards, balanced and num_shards > 1)

    def place(array, axes):
        if len(axes) > 1 and axes[1] == "seq":
            array = array[:, order]
        return jax.device_put(array, NamedSharding(mesh, rules.spec(*axes)))

    with jax.set_mesh(mesh):
        placed = SelectiveScanInputs(*map(place, inputs, AXES))
        placed_weight = place(weight, ("mlp", None))
        placed_ids = None
        if segment_ids is not None:
            placed_ids = place(segment_ids, ("batch", "seq"))
        function = partial(compute, rules, balanced=balanced)
        step = jax.jit(jax.grad(function, (0, 1), has_aux=True), compiler_options=QUICK)
        gradients, y = step(placed, placed_weight, placed_ids)

    def restore(array, axes):
        array = np.asarray(array)
        if len(axes) > 1 and axes[1] == "seq":
            array = array[:, np.argsort(order)]
        return array

    d_inputs, d_weight = gradients
    return {
        "y": restore(y, AXES.x),
        "weight": np.asarray(d_weight),
        **{
            name: restore(getattr(d_inputs, name), axes)
            for name, axes in AXES._asdict().items()
        },
    }


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("sizes", "balanced", "packed"),
    [
        ({"context": 4, "tensor": 2}, True, True),
        # Runs of two tokens, fewer than the convolution sees.
        pytest.param({"context": 8}, True, True, marks=pytest.mark.more),
        pytest.param({"context": 8}, False, True, marks=pytest.mark.more),
        pytest.param({"context": 2, "fsdp": 2}, True, False, marks=pytest.mark.more),
    ],
)
def test_rows_on_several_devices_equal_rows_on_one(
    sizes, balanced, packed, mesh, one_device_mesh
):
    rng = np.random.default_rng(0)
    inputs = SelectiveScanInputs(
        *(rng.standard_normal(shape).astype(np.float32) for shape in SHAPES)
    )
    weight = rng.standard_normal((F, W)).astype(np.float32)
    segments = SEGMENTS if packed else None
    truth = run(one_device_mesh, inputs, weight, segments, balanced)
    result = run(mesh(**sizes), inputs, weight, segments, balanced)
    for name, array in truth.items():
        scale = max(1.0, np.abs(array).max())
        np.testing.assert_allclose(
            result[name], array, rtol=0, atol=1e-6 * scale, err_msg=name
        )
