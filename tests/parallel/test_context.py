"""Attention over a split sequence equals a float64 softmax over the whole one, gradients too, by
every method, in every order, and communicates as its method says."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.config import MaxlmError
from maxlm.parallel.attention import sharded_attention
from maxlm.parallel.context import Split, check_context, own_indices, sequence_order
from maxlm.sharding import ShardingConfig
from tests.pallas_kernels import reference

QUICK = {"xla_backend_optimization_level": 0}
METHODS = ("all_gather", "ring", "ulysses")

# mesh; B, S, N, K, H; mask; whether documents are packed.
CASES = {
    "packed, grouped": ({"context": 2, "tensor": 2, "fsdp": 2}, (2, 28, 8, 4, 3), {}, True),
    "window, multi-query": ({"context": 4, "tensor": 2}, (1, 24, 8, 1, 5), {"window": 5}, False),
    "fewer kv heads than tensor": ({"context": 2, "tensor": 4}, (1, 20, 8, 2, 3), {}, True),
    "packed, window": ({"context": 2, "data": 2}, (2, 12, 2, 2, 3), {"window": 4}, True),
    "window within a device": ({"context": 4, "data": 2}, (2, 32, 2, 1, 3), {"window": 3}, False),
    "three devices": ({"context": 3}, (1, 18, 6, 2, 3), {}, False),
    "no causal mask": ({"context": 3}, (2, 6, 3, 3, 4), {"causal": False}, True),
}


def rules_on(axes, kv_heads):
    rules = ShardingConfig().compute.on(dict(axes.shape))
    # As the planner does where kv heads are too few for `tensor`.
    whole = kv_heads % dict(axes.shape)["tensor"] != 0
    return rules.model_copy(update={"kv_heads": ()}) if whole else rules


def attend_and_pull(rules, options, packed):
    """(q, k, v, d_o, segments) → the output, dQ, dK, dV."""

    def run(q, k, v, d_o, segments):
        pair = (segments, segments) if packed else None
        attend = partial(sharded_attention, rules=rules, segment_ids=pair, **options)
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(d_o)

    return run


def laid_out(axes, rules, q, k, v, d_o, segments):
    specs = [rules.spec("batch", "seq", heads, None) for heads in ("heads", "kv_heads")]
    specs = (specs[0], specs[1], specs[1], specs[0], rules.spec("batch", "seq"))
    return [
        jax.device_put(x, NamedSharding(axes, spec))
        for x, spec in zip((q, k, v, d_o, segments), specs, strict=True)
    ]


def arrays(B, S, N, K, H, seed=0):
    q, k, v = reference.operands(B, S, S, N, K, H, seed)
    rng = np.random.default_rng(seed + 7)
    return q, k, v, rng.standard_normal(q.shape).astype(np.float32), reference.packed(rng, B, S)


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_reference(case, method, balanced, mesh):
    sizes, shape, mask, packed = CASES[case]
    axes = mesh(**sizes)
    rules = rules_on(axes, shape[3])
    whole = arrays(*shape)
    order = sequence_order(shape[1], sizes["context"], balanced)
    options = {"method": method, "balanced": balanced, **mask}
    with jax.set_mesh(axes):
        run = jax.jit(attend_and_pull(rules, options, packed), compiler_options=QUICK)
        found = run(*laid_out(axes, rules, *(x[:, order] for x in whole)))
    q, k, v, d_o, segments = whole
    pair = (segments, segments) if packed else None
    o, _, *grads = reference.attention(q, k, v, d_o=d_o, segment_ids=pair, **mask)
    for name, a, b in zip(("o", "d_q", "d_k", "d_v"), found, (o, *grads), strict=True):
        np.testing.assert_allclose(a, b[:, order], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("method", "balanced"), [("all_gather", False), ("ring", True), ("ulysses", True)]
)
def test_inside_a_program_that_is_manual_over_stages(method, balanced, mesh):
    """As a pipeline uses it: each stage attends in a scan and pulls its gradient there."""
    axes = mesh(stage=2, context=2, tensor=2)
    rules = rules_on(axes, 2)
    options = {"method": method, "balanced": balanced, "window": 6}
    whole = [
        np.stack(x) for x in zip(*(arrays(2, 12, 4, 2, 3, seed) for seed in range(4)), strict=True)
    ]
    order = sequence_order(12, 2, balanced)
    specs = [rules.spec("batch", "seq", heads, None) for heads in ("heads", "kv_heads")]
    specs = (specs[0], specs[1], specs[1], specs[0], rules.spec("batch", "seq"))

    def stage(operands):
        """[micro, B, S, ...] of this stage."""
        attend = attend_and_pull(rules, options, packed=True)
        return lax.scan(lambda _, one: (None, attend(*one)), None, operands)[1]

    with jax.set_mesh(axes):
        operands = [
            jax.device_put(x[:, :, order], NamedSharding(axes, PartitionSpec("stage", *spec)))
            for x, spec in zip(whole, specs, strict=True)
        ]
        by_stage = PartitionSpec("stage")
        run = jax.shard_map(
            stage, in_specs=by_stage, out_specs=by_stage, axis_names={"stage"}, check_vma=False
        )
        found = jax.jit(run, compiler_options=QUICK)(tuple(operands))
    for micro in range(4):
        q, k, v, d_o, segments = (x[micro] for x in whole)
        o, _, *grads = reference.attention(q, k, v, d_o=d_o, segment_ids=(segments,) * 2, window=6)
        for a, b in zip(found, (o, *grads), strict=True):
            np.testing.assert_allclose(a[micro], b[:, order], atol=1e-5)
