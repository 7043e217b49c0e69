"""On a mesh, attention takes what its kernel takes: scores scaled, capped and changed by distance,
values of their own size, keys of another length. Output and gradients are those of one device."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.parallel.attention import sharded_attention
from maxlm.parallel.context import sequence_order_indices
from maxlm.sharding import ShardingConfig
from pallas_kernels.attention import attention
from tests.pallas_kernels import reference

QUICK = {"xla_backend_optimization_level": 0}
METHODS = ("all_gather", "ring", "ulysses")


class Case(NamedTuple):
    mesh: dict[str, int]
    shape: tuple[int, ...]
    """B, S, T, N, K, H, Hv."""
    options: dict[str, Any]
    """Of ``attention``, static."""
    slopes: bool = False
    reach: int | None = None
    packed: bool = False


CAPPED = {"scale": 0.9, "soft_cap": 1.5}

SPLIT = {
    "capped, latent heads": Case(
        {"context": 4, "data": 2}, (2, 16, 16, 4, 4, 6, 4), CAPPED, packed=True
    ),
    "latent, one kv head": Case({"context": 2, "tensor": 2}, (1, 8, 8, 4, 1, 3, 5), {}),
    "slopes": Case({"context": 4}, (2, 16, 16, 8, 2, 3, 2), {}, slopes=True, packed=True),
    "slopes, window": Case(
        {"context": 4, "tensor": 2}, (1, 24, 24, 8, 2, 3, 3), {"window": 7, **CAPPED}, slopes=True
    ),
    "slopes, both ways": Case(
        {"context": 3, "data": 2}, (2, 12, 12, 3, 3, 4, 4), {"causal": False}, slopes=True
    ),
    "biases": Case(
        {"context": 2, "tensor": 2, "fsdp": 2}, (2, 12, 12, 4, 2, 3, 3), {}, reach=4, packed=True
    ),
    "biases, both ways": Case(
        {"context": 4, "data": 2}, (2, 16, 16, 4, 1, 3, 3), {"causal": False, **CAPPED}, reach=20
    ),
}

WHOLE = {
    "biases, heads split": Case(
        {"data": 2, "tensor": 4}, (2, 9, 9, 8, 4, 3, 5), CAPPED, reach=3, packed=True
    ),
    "biases, whole kv heads": Case(
        {"fsdp": 2, "tensor": 4}, (4, 7, 7, 8, 2, 3, 3), {"causal": False}, slopes=True, reach=30
    ),
    "more keys": Case(
        {"data": 2, "tensor": 2},
        (2, 5, 11, 4, 2, 3, 4),
        {"causal": False},
        slopes=True,
        reach=6,
        packed=True,
    ),
    "fewer keys": Case({"data": 2}, (2, 9, 4, 2, 2, 4, 3), {"causal": False}, packed=True),
}


def rules_on(axes, kv_heads):
    rules = ShardingConfig().compute.for_mesh(dict(axes.shape))
    whole = kv_heads % dict(axes.shape)["tensor"] != 0
    return rules.model_copy(update={"kv_heads": ()}) if whole else rules


def arrays(case: Case, seed: int = 0):
    """q, k, v, d_o; segments; slopes and biases."""
    B, S, T, N, K, H, Hv = case.shape
    q, k, v = reference.operands(B, S, T, N, K, H, seed, Hv)
    rng = np.random.default_rng(seed + 1)
    d_o = rng.standard_normal((B, S, N, Hv)).astype(np.float32)
    rows = reference.packed(rng, B, S)
    segments = (rows, rows if S == T else reference.packed(rng, B, T)) if case.packed else None
    slopes = rng.uniform(0, 0.5, N).astype(np.float32) if case.slopes else None
    reach = case.reach
    biases = None if reach is None else rng.normal(0, 2, (N, 2 * reach + 1)).astype(np.float32)
    return (2 * q, k, v, d_o), segments, slopes, biases


def pulled(attend):
    """(q, k, v, d_o, segments, slopes, biases) → the output, dQ, dK, dV, dBiases."""

    def run(q, k, v, d_o, segments, slopes, biases):
        def of(q, k, v, biases):
            return attend(q, k, v, segment_ids=segments, slopes=slopes, biases=biases)

        o, pull = jax.vjp(of, q, k, v, biases)
        return o, *pull(d_o)

    return run


def on_one_device(case: Case, operands, segments, slopes, biases):
    attend = partial(attention, backend="xla", **case.options)
    return jax.jit(pulled(attend), compiler_options=QUICK)(*operands, segments, slopes, biases)


def laid_out(axes, rules, operands, segments):
    specs = [rules.spec("batch", "seq", heads, None) for heads in ("heads", "kv_heads")]
    specs = (specs[0], specs[1], specs[1], specs[0])

    def put(x, spec):
        return jax.device_put(x, NamedSharding(axes, spec))

    rows = rules.spec("batch", "seq")
    return [put(*x) for x in zip(operands, specs, strict=True)], jax.tree.map(
        lambda x: put(x, rows), segments
    )


def check(axes, case: Case, order=None, **method):
    rules = rules_on(axes, case.shape[4])
    operands, segments, slopes, biases = arrays(case)
    wanted = on_one_device(case, operands, segments, slopes, biases)

    def turned(tree):
        return tree if order is None else jax.tree.map(lambda x: x[:, order], tree)

    attend = partial(sharded_attention, rules=rules, **case.options, **method)
    with jax.set_mesh(axes):
        placed = laid_out(axes, rules, turned(operands), turned(segments))
        run = jax.jit(pulled(attend), compiler_options=QUICK)
        *found, d_biases = run(*placed[0], placed[1], slopes, biases)
    assert found[0].sharding.spec == placed[0][0].sharding.spec
    for name, a, b in zip(("o", "d_q", "d_k", "d_v"), found, turned(wanted[:4]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    if biases is not None:
        np.testing.assert_allclose(d_biases, wanted[4], atol=2e-5)


# Every case by two methods, every method in both orders.
PAIRS = [
    (name, METHODS[(i + j) % 3], (i + j) % 2 == 0) for i, name in enumerate(SPLIT) for j in (0, 1)
]


@pytest.mark.parametrize(("name", "method", "balanced"), PAIRS)
def test_over_a_split_sequence(name, method, balanced, mesh):
    case = SPLIT[name]
    order = sequence_order_indices(case.shape[1], case.mesh["context"], balanced)
    check(mesh(**case.mesh), case, order, method=method, balanced=balanced)


@pytest.mark.parametrize("name", WHOLE)
def test_over_whole_sequences(name, mesh):
    check(mesh(**WHOLE[name].mesh), WHOLE[name])


def test_slopes_and_biases_count_positions_one_by_one(mesh):
    """Of a token that is generated: keys lie in slots from 0 on."""
    axes = mesh(data=2, tensor=2)
    rules = rules_on(axes, 2)
    (q, k, v, _), _, slopes, biases = arrays(
        Case({}, (2, 2, 9, 4, 2, 3, 5), {}, slopes=True, reach=2)
    )
    positions = np.array([[3, 4], [7, 8]], np.int32)
    options = {"slopes": slopes, "biases": biases, "q_positions": positions}
    with jax.set_mesh(axes):
        placed, _ = laid_out(axes, rules, (q, k, v, q), None)
        at = jax.device_put(positions, NamedSharding(axes, rules.spec("batch", "seq")))
        attend = partial(sharded_attention, rules=rules, slopes=slopes, biases=biases)
        found = jax.jit(lambda *x: attend(*x[:3], q_positions=x[3]))(*placed[:3], at)
    np.testing.assert_allclose(found, reference.attention(q, k, v, **options)[0], atol=1e-5)


@pytest.mark.parametrize("method", METHODS[1:])
def test_biases_split_by_heads_get_their_gradient_so_within_stages(method, mesh):
    """As a pipeline uses them: manual over stages, biases of each stage's own."""
    axes = mesh(stage=2, context=2, tensor=2)
    rules = rules_on(axes, 2)
    case = Case({}, (1, 8, 8, 4, 2, 3, 5), CAPPED, slopes=True, reach=3, packed=True)
    seeds = [arrays(case, seed) for seed in range(2)]
    attend = partial(sharded_attention, rules=rules, method=method, balanced=True, **CAPPED)
    order = sequence_order_indices(8, 2, balanced=True)
    queries, keys = (rules.spec("batch", "seq", x, None) for x in ("heads", "kv_heads"))
    row, by_head = rules.spec("batch", "seq"), rules.spec("heads", None)
    specs = (queries, keys, keys, queries), (row, row), PartitionSpec(None), by_head

    def turned(tree):
        operands, segments, *rest = tree
        return *jax.tree.map(lambda x: x[:, order], (operands, segments)), *rest

    def stage(everything):
        operands, segments, slopes, biases = jax.tree.map(lambda x: x[0], everything)
        return jax.tree.map(lambda x: x[None], pulled(attend)(*operands, segments, slopes, biases))

    with jax.set_mesh(axes):
        everything = jax.tree.map(
            lambda spec, *x: jax.device_put(
                np.stack(x), NamedSharding(axes, PartitionSpec("stage", *spec))
            ),
            specs,
            *(turned(x) for x in seeds),
        )
        by_stage = PartitionSpec("stage")
        run = jax.shard_map(
            stage, in_specs=by_stage, out_specs=by_stage, axis_names={"stage"}, check_vma=False
        )
        *found, d_biases = jax.jit(run, compiler_options=QUICK)(everything)
    assert d_biases.sharding.spec == PartitionSpec("stage", "tensor", None)
    for i, own in enumerate(seeds):
        *wanted, wanted_biases = on_one_device(case, *own)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(a)[i], b[:, order], atol=1e-5)
        np.testing.assert_allclose(np.asarray(d_biases)[i], wanted_biases, atol=2e-5)
