"""Experts split over devices: the same numbers as on one, and what crosses the wire."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.models.params import bind
from maxlm.models.remat import apply_remat
from maxlm.parallel import dispatch, experts
from tests.models import moe_building as building
from tests.models.building import QUICK
from tests.models.moe_building import (
    BIASED_CAPACITY,
    CAPACITY,
    DEEPSEEK_V3,
    GPT_OSS,
    LLAMA4,
    MIXTRAL,
    NEMOTRON_3,
    QWEN2_MOE,
    UNGATED,
)

SPLIT_SEQ = {"residual": ("context", "tensor")}


def assert_equal(got, want, tolerance=1e-5):
    def close(a, b):
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max())
        )

    jax.tree.map(close, got, want)


@pytest.fixture(scope="module")
def on_one_device(one_device_mesh):
    results = {}

    def get(config):
        if id(config) not in results:
            results[id(config)] = building.outputs_and_gradients(
                one_device_mesh, config
            )
        return results[id(config)]

    return get


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("config", "axes", "rules"),
    [
        (DEEPSEEK_V3, {"expert": 4}, {}),
        (MIXTRAL, {"expert": 2, "fsdp": 2, "tensor": 2}, {}),
        (MIXTRAL, {"expert": 2, "fsdp": 2, "tensor": 2}, SPLIT_SEQ),
        (UNGATED, {"fsdp": 2, "context": 3}, {}),
        # Experts over two axes; experts whole in use though split in storage.
        (MIXTRAL, {"expert": 2, "fsdp": 2}, {"expert": ("expert", "fsdp")}),
        (MIXTRAL, {"expert": 4}, {"expert": ()}),
        (CAPACITY, {"expert": 2, "fsdp": 2, "tensor": 2}, {}),
        # Offsets, of which an output's is added once; weights on inputs; a gate on the
        # shared layer; narrow vectors.
        (GPT_OSS, {"expert": 2, "fsdp": 2, "tensor": 2}, {}),
        *(
            pytest.param(*case, marks=pytest.mark.more)
            for case in (
                (MIXTRAL, {"expert": 2, "context": 3}, {}),
                (CAPACITY, {"expert": 2, "tensor": 2}, SPLIT_SEQ),
                (GPT_OSS, {"expert": 2, "context": 3}, {}),
                (GPT_OSS, {"expert": 2, "fsdp": 2, "tensor": 2}, SPLIT_SEQ),
                (LLAMA4, {"expert": 2, "tensor": 3}, {}),
                (LLAMA4, {"fsdp": 2, "tensor": 2}, SPLIT_SEQ),
                (QWEN2_MOE, {"fsdp": 2, "tensor": 2}, SPLIT_SEQ),
                (NEMOTRON_3, {"expert": 2, "fsdp": 2, "tensor": 2}, SPLIT_SEQ),
                (NEMOTRON_3, {"tensor": 2, "context": 3}, {"latent": "tensor"}),
                (BIASED_CAPACITY, {"expert": 2, "fsdp": 2, "tensor": 2}, {}),
                (BIASED_CAPACITY, {"expert": 2, "tensor": 2}, SPLIT_SEQ),
            )
        ),
    ],
)
def test_any_layout_equals_one_device(config, axes, rules, mesh, on_one_device):
    got = building.outputs_and_gradients(mesh(**axes), config, **rules)
    assert_equal(got, on_one_device(config))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "config", [UNGATED, CAPACITY, pytest.param(GPT_OSS, marks=pytest.mark.more)]
)
def test_hidden_activations_may_be_made_in_parts(
    config, mesh, on_one_device, monkeypatch
):
    whole = on_one_device(config)
    widths = []
    compute_hidden = experts._compute_hidden

    def record_width(plan, rows, kernels):
        widths.append(kernels["up"].shape[2])
        return compute_hidden(plan, rows, kernels)

    monkeypatch.setattr(experts, "_compute_hidden", record_width)
    monkeypatch.setattr(experts, "HIDDEN_BYTES", 1 << 9)
    assert_equal(building.outputs_and_gradients(mesh(fsdp=2), config), whole)
    assert max(widths) < config.d_ff


def _ragged_all_to_all(operand, output, starts, sizes, put, received, *, axis_name):
    """What JAX's documentation says of lax.ragged_all_to_all, which XLA has not for
    CPUs."""
    ways = lax.axis_size(axis_name)
    here = lax.axis_index(axis_name)
    everyone = [lax.all_gather(a, axis_name) for a in (operand, starts, sizes, put)]
    index = jnp.arange(len(operand))
    per_device = len(starts) // ways
    for peer in range(ways):
        rows, first, count, at = (a[peer] for a in everyone)
        for i in range(per_device):
            slice_ = here * per_device + i
            inside = (index >= first[slice_]) & (index < first[slice_] + count[slice_])
            agreed = count[slice_] == received[peer * per_device + i]
            target = jnp.where(
                inside & agreed, at[slice_] + index - first[slice_], len(output)
            )
            output = output.at[target].set(rows, mode="drop")
    return output


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("config", "axes"),
    [
        pytest.param(MIXTRAL, {"expert": 4}, marks=pytest.mark.more),
        (MIXTRAL, {"expert": 2, "fsdp": 2, "tensor": 2}),
        pytest.param(GPT_OSS, {"expert": 2, "tensor": 2}, marks=pytest.mark.more),
    ],
)
def test_ragged_exchanges_equal_the_portable_ones(
    config, axes, mesh, on_one_device, monkeypatch
):
    monkeypatch.setattr(lax, "ragged_all_to_all", _ragged_all_to_all)
    monkeypatch.setattr(experts, "supports_ragged_all_to_all", lambda: True)
    got = building.outputs_and_gradients(mesh(**axes), config)
    assert_equal(got, on_one_device(config))


def _accumulated(mesh, config, remat, *, staged, options=QUICK):
    """(outputs, losses, gradients of x and, summed over two micro-batches, of the
    parameters) as a pipeline stage computes them: jax.vjp in the body of a scan, manual
    over `stage` or not."""
    model = building.layer(config, building.compute_rules(mesh))
    params = building.placed(mesh, config, building.random_params(config))
    x, _, d_y = (np.stack([a, -2 * a, a[::-1]]) for a in building.inputs())
    spec = P(None, *model.rules.spec("batch", "seq"))
    x, d_y = (
        jax.device_put(a.astype(np.float32), NamedSharding(mesh, spec))
        for a in (x, d_y)
    )

    def layer(params, x):
        y, aux = bind(model, params)(x)
        return y, aux.loss

    layer = apply_remat(layer, remat)

    def program(params, x, d_y):
        def body(total, inputs):
            x, d_y = inputs
            (y, loss), transpose = jax.vjp(layer, params, x)
            d_params, d_x = transpose((d_y, jnp.ones_like(loss)))
            return jax.tree.map(jnp.add, total, d_params), (y, loss, d_x)

        return lax.scan(body, jax.tree.map(jnp.zeros_like, params), (x, d_y))

    if staged:
        program = jax.shard_map(
            program,
            in_specs=(P(), P(), P()),
            out_specs=P(),
            axis_names={"stage"},
            check_vma=False,
        )
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(program).lower(params, x, d_y).compile(compiler_options=options)
        )
        return jax.tree.map(np.asarray, compiled(params, x, d_y)), compiled.as_text()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "config",
    [
        MIXTRAL,
        *(
            pytest.param(config, marks=pytest.mark.more)
            for config in (CAPACITY, GPT_OSS, QWEN2_MOE, NEMOTRON_3)
        ),
    ],
)
def test_it_runs_inside_a_pipeline_stage(config, mesh, one_device_mesh):
    want, _ = _accumulated(one_device_mesh, config, "none", staged=False)
    axes = {"stage": 2, "expert": 2, "tensor": 2}
    got, _ = _accumulated(mesh(**axes), config, "full", staged=True)
    assert_equal(got, want)


@pytest.mark.heavy
def test_the_backward_pass_repeats_no_exchange_but_the_one_it_needs(mesh):
    # There: rows and their weights; back: outputs. Then the first two again under
    # remat, and cotangents there, gradients of rows and of weights back.
    for remat, count in (("none", 6), ("full", 8)):
        _, text = _accumulated(mesh(expert=2), MIXTRAL, remat, staged=False, options={})
        assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == count


def test_capacity_is_a_share_of_the_sequence_rounded_up():
    assert dispatch.compute_expert_capacity(10, 2, 8, 1.0) == 3
    assert dispatch.compute_expert_capacity(10, 2, 8, 1.25) == 4
    assert (
        dispatch.compute_expert_capacity(10, 2, 4, 9.0) == 10
    )  # a token chooses an expert at most once
