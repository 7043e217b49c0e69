"""Attention on a mesh equals a float64 softmax over the whole sequence, gradients too,
by every method, in every order, with all that its kernel takes; and it communicates as
its method says."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.config import MaxlmError
from maxlm.config.errors import check_requirements
from maxlm.parallel.attention import sharded_attention
from maxlm.parallel.blocks import KeyValueBlock, _Queries
from maxlm.parallel.context import (
    SequenceSplit,
    require_context,
    sequence_order_indices,
)
from maxlm.parallel.terms import AttentionTerms, HeadTerms
from maxlm.sharding import ShardingConfig
from tests.models.building import QUICK
from tests.pallas_kernels import reference

METHODS = ("all_gather", "ring", "ulysses")


def attend_on_mesh(
    q,
    k,
    v,
    *,
    window=None,
    scale=None,
    soft_cap=None,
    slopes=None,
    biases=None,
    sinks=None,
    rules,
    causal=True,
    segment_ids=None,
    method="all_gather",
    balanced=False,
):
    """``sharded_attention`` with the keywords of the kernels' ``attention``."""
    terms = AttentionTerms(window, scale, soft_cap, slopes, biases, sinks)
    return sharded_attention(
        q,
        k,
        v,
        terms,
        rules=rules,
        causal=causal,
        segment_ids=segment_ids,
        method=method,
        balanced=balanced,
    )


class MeshCase(NamedTuple):
    mesh: dict[str, int]
    shape: tuple[int, ...]
    """B, S, T, N, K, H, Hv."""
    options: dict[str, Any]
    """Of ``attention``, static."""
    slopes: bool = False
    reach: int | None = None
    packed: bool = False
    sinks: bool = False


CAPPED = {"scale": 0.9, "soft_cap": 1.5}
BOTH_WAYS = {"causal": False}
WINDOW = {"window": 7, **CAPPED}
SPLIT = {
    "packed, fewer kv heads than tensor, latent heads": MeshCase(
        {"context": 2, "tensor": 4},
        (1, 20, 20, 8, 2, 6, 4),
        CAPPED,
        packed=True,
        sinks=True,
    ),
    "window, slopes, multi-query": MeshCase(
        {"context": 4, "tensor": 2},
        (1, 24, 24, 8, 1, 3, 3),
        WINDOW,
        slopes=True,
        packed=True,
        sinks=True,
    ),
    "window within a device": MeshCase(
        {"context": 4, "data": 2}, (2, 32, 32, 4, 2, 3, 3), {"window": 3}, sinks=True
    ),
    "both ways, slopes": MeshCase(
        {"context": 3}, (2, 12, 12, 3, 3, 4, 4), BOTH_WAYS, slopes=True, packed=True
    ),
    "biases": MeshCase(
        {"context": 2, "tensor": 2, "fsdp": 2},
        (2, 12, 12, 4, 2, 3, 3),
        {},
        reach=4,
        packed=True,
    ),
    "biases, both ways": MeshCase(
        {"context": 4, "data": 2},
        (2, 16, 16, 4, 1, 3, 3),
        {**BOTH_WAYS, **CAPPED},
        reach=20,
        sinks=True,
    ),
}
WHOLE = {
    "biases, heads split": MeshCase(
        {"data": 2, "tensor": 4}, (2, 9, 9, 8, 4, 3, 5), CAPPED, reach=3, packed=True
    ),
    "biases, whole kv heads": MeshCase(
        {"fsdp": 2, "tensor": 4},
        (4, 7, 7, 8, 2, 3, 3),
        BOTH_WAYS,
        True,
        reach=30,
        sinks=True,
    ),
    "more keys": MeshCase(
        {"data": 2, "tensor": 2},
        (2, 5, 11, 4, 2, 3, 4),
        BOTH_WAYS,
        True,
        reach=6,
        packed=True,
    ),
    "fewer keys": MeshCase({"data": 2}, (2, 9, 4, 2, 2, 4, 3), BOTH_WAYS, packed=True),
}


def rules_on(axes, kv_heads):
    rules = ShardingConfig().compute.for_mesh(dict(axes.shape))
    # As the planner does where kv heads are too few for `tensor`.
    whole = kv_heads % dict(axes.shape)["tensor"] != 0
    return rules.model_copy(update={"kv_heads": ()}) if whole else rules


def arrays(case: MeshCase, seed: int = 0):
    """(q, k, v, d_o), segments, slopes, what is learnt of each head."""
    B, S, T, N, K, H, Hv = case.shape
    q, k, v = reference.operands(B, S, T, N, K, H, seed, Hv)
    rng = np.random.default_rng(seed + 1)
    d_o = rng.standard_normal((B, S, N, Hv)).astype(np.float32)
    rows = reference.packed(rng, B, S)
    segments = (
        (rows, rows if S == T else reference.packed(rng, B, T)) if case.packed else None
    )
    slopes = rng.uniform(0, 0.5, N).astype(np.float32) if case.slopes else None
    learnt = {"sinks": rng.normal(0, 2, N).astype(np.float32)} if case.sinks else {}
    if case.reach is not None:
        learnt["biases"] = rng.normal(0, 2, (N, 2 * case.reach + 1)).astype(np.float32)
    return (2 * q, k, v, d_o), segments, slopes, learnt


def pulled(attend):
    """(operands, segments, slopes, learnt) → the output, dQ, dK, dV, and those of
    learnt ones."""

    def run(operands, segments, slopes, learnt):
        *qkv, d_o = operands

        def of(q, k, v, learnt):
            return attend(q, k, v, segment_ids=segments, slopes=slopes, **learnt)

        o, pull = jax.vjp(of, *qkv, learnt)
        return o, *pull(d_o)

    return run


def specs_of(rules):
    """Of the operands, and of segments."""
    queries, keys = (
        rules.spec("batch", "seq", heads, None) for heads in ("heads", "kv_heads")
    )
    row = rules.spec("batch", "seq")
    return (queries, keys, keys, queries), (row, row)


def laid_out(axes, rules, operands, segments=None):
    def put(x, spec):
        return None if x is None else jax.device_put(x, NamedSharding(axes, spec))

    specs, rows = specs_of(rules)
    placed = [put(*x) for x in zip(operands, specs, strict=False)]
    return placed, None if segments is None else tuple(map(put, segments, rows))


def assert_exact(results, case: MeshCase, everything, order):
    (q, k, v, d_o), segments, slopes, learnt = everything
    options = {"segment_ids": segments, "slopes": slopes, **learnt, **case.options}
    o, _, *grads = reference.attention(q, k, v, d_o=d_o, **options)
    for i, (name, actual) in enumerate(
        zip(("o", "d_q", "d_k", "d_v"), results, strict=False)
    ):
        want = (o, *grads)[i]
        np.testing.assert_allclose(actual, want[:, order], atol=2e-5, err_msg=name)
    for name, want in zip(learnt, grads[3:], strict=True):
        np.testing.assert_allclose(results[4][name], want, atol=3e-5, err_msg=name)


def check(
    axes, case: MeshCase, order=slice(None), *, method="all_gather", balanced=False
):
    rules = rules_on(axes, case.shape[4])
    everything = arrays(case)
    operands, segments, slopes, learnt = everything
    attend = partial(
        attend_on_mesh, rules=rules, method=method, balanced=balanced, **case.options
    )
    with jax.set_mesh(axes):
        turned = jax.tree.map(lambda x: x[:, order], (operands, segments))
        placed, segments = laid_out(axes, rules, *turned)
        run = jax.jit(pulled(attend), compiler_options=QUICK)
        results = run(placed, segments, slopes, learnt)
    assert results[0].sharding.spec == placed[0].sharding.spec
    assert_exact(results, case, everything, order)


# Every case by every method, in one order or the other.
PAIRS = [
    (case, m, (i + j) % 2 == 0)
    for i, case in enumerate(SPLIT)
    for j, m in enumerate(METHODS)
]


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "method", "balanced"), PAIRS)
def test_over_a_split_sequence(name, method, balanced, mesh):
    case = SPLIT[name]
    order = sequence_order_indices(case.shape[1], case.mesh["context"], balanced)
    check(mesh(**case.mesh), case, order, method=method, balanced=balanced)


@pytest.mark.parametrize("name", WHOLE)
def test_over_whole_sequences(name, mesh):
    check(mesh(**WHOLE[name].mesh), WHOLE[name])


@pytest.mark.heavy
@pytest.mark.parametrize("method", METHODS)
def test_what_heads_learn_gets_its_gradient_by_heads_within_stages(method, mesh):
    """As a pipeline uses them: manual over stages, biases and sinks of each stage's
    own."""
    axes = mesh(stage=2, context=2, tensor=2)
    rules = rules_on(axes, 2)
    case = MeshCase({}, (1, 8, 8, 4, 2, 3, 5), CAPPED, True, 3, packed=True, sinks=True)
    seeds = [arrays(case, seed) for seed in range(2)]
    attend = partial(
        attend_on_mesh, rules=rules, method=method, balanced=True, **CAPPED
    )
    order = sequence_order_indices(8, 2, balanced=True)
    learnt = {"sinks": rules.spec("heads"), "biases": rules.spec("heads", None)}
    specs = (*specs_of(rules), PartitionSpec(None), learnt)

    def turned(tree):
        operands, segments, *rest = tree
        return *jax.tree.map(lambda x: x[:, order], (operands, segments)), *rest

    def stage(everything):
        stage_operands = jax.tree.map(lambda x: x[0], everything)
        return jax.tree.map(lambda x: x[None], pulled(attend)(*stage_operands))

    def put(spec, *x):
        return jax.device_put(
            np.stack(x), NamedSharding(axes, PartitionSpec("stage", *spec))
        )

    by_stage = PartitionSpec("stage")
    with jax.set_mesh(axes):
        everything = jax.tree.map(put, specs, *(turned(x) for x in seeds))
        run = jax.shard_map(
            stage,
            in_specs=by_stage,
            out_specs=by_stage,
            axis_names={"stage"},
            check_vma=False,
        )
        results = jax.jit(run, compiler_options=QUICK)(everything)
    assert results[4]["biases"].sharding.spec == PartitionSpec("stage", "tensor", None)
    assert results[4]["sinks"].sharding.spec == PartitionSpec("stage", "tensor")
    for i, stage_arrays in enumerate(seeds):
        stage_results = jax.tree.map(lambda x, i=i: np.asarray(x)[i], results)
        assert_exact(stage_results, case, stage_arrays, order)


COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        ("all_gather", {"all-gather"}, {"all-gather", "reduce-scatter"}),
        ("ring", {"collective-permute"}, {"collective-permute"}),
        ("ulysses", {"all-to-all"}, {"all-to-all"}),
    ],
)
def test_each_method_communicates_as_it_should(method, forward, backward, mesh):
    axes = mesh(context=4)
    rules = rules_on(axes, 4)
    with jax.set_mesh(axes):
        operands, _ = laid_out(
            axes, rules, arrays(MeshCase({}, (1, 16, 16, 4, 4, 3, 3), {}))[0]
        )
        attend = partial(attend_on_mesh, rules=rules, method=method, balanced=True)
        both = jax.jit(lambda *qkv: jax.vjp(attend, *qkv), compiler_options=QUICK)
        _, pull = both(*operands[:3])
        there = (
            jax.jit(attend)
            .lower(*operands[:3])
            .compile(compiler_options=QUICK)
            .as_text()
        )
        back = (
            jax.jit(pull).lower(operands[3]).compile(compiler_options=QUICK).as_text()
        )
    assert set(re.findall(COLLECTIVES, there)) == forward
    assert set(re.findall(COLLECTIVES, back)) == backward


def test_a_window_within_reach_of_one_neighbour_ends_the_ring_there(mesh):
    """Keys make one hop, and their gradients one back, however many devices there
    are."""
    axes = mesh(context=8)
    rules = rules_on(axes, 1)
    with jax.set_mesh(axes):
        operands, _ = laid_out(
            axes, rules, arrays(MeshCase({}, (1, 32, 32, 1, 1, 3, 3), {}))[0]
        )
        run = pulled(partial(attend_on_mesh, rules=rules, method="ring", window=5))
        lowered = jax.jit(run).lower(operands, None, None, {})
        text = lowered.compile(compiler_options=QUICK).as_text()
    assert " while(" not in text
    hops = re.findall(
        r"collective-permute(?:-start)?\(.*source_target_pairs=\{\{0,(\d)\}", text
    )
    assert set(hops) == {"1", "7"}


@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize(("ways", "balanced"), [(4, False), (4, True), (3, True)])
def test_only_what_the_mask_empties_is_skipped(ways, balanced, window, mesh):
    """Chunks of queries and keys that a device computes with are those with a pair in
    sight."""
    size = 3
    length = ways * size * (2 if balanced else 1)
    sees = reference.mask(length, length, window=window)[0]
    chunks = np.arange(length).reshape(-1, size)
    worth = {(a[0], b[0]) for a in chunks for b in chunks if sees[np.ix_(a, b)].any()}
    computed = set()
    work = []
    with jax.set_mesh(mesh(context=ways)):
        split = SequenceSplit(("context",), "ring", balanced, True, window)
        rows = size * split.chunks_per_device
        block = KeyValueBlock(
            jnp.zeros((1, rows, 1, 1)), jnp.zeros((1, rows, 1, 1)), None
        )
        for device in range(ways):
            q = jnp.zeros((1, rows, 1, 1))
            queries = _Queries(split, jnp.int32(device), None, HeadTerms(), (q,))
            before = len(computed)
            for t in range(split.last_ring_step(rows) + 1):
                other = (device - t) % ways
                key_device = jnp.int32(other) if t else None
                for pair in queries.list_pairs(block, key_device):
                    if pair.is_live is None or pair.is_live:
                        q_start = split.chunk_starts(device, size)[pair.q_chunk]
                        k_start = split.chunk_starts(other, size)[pair.k_chunk]
                        computed.add((q_start, k_start))
            work.append(len(computed) - before)
    assert computed == worth
    if balanced and window is None:
        assert set(work) == {2 * ways + 1}  # of 4 · ways without the mask


@given(st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_the_order_deals_out_each_token_once_with_equal_causal_work(
    ways, size, balanced
):
    length = ways * size * (2 if balanced else 1)
    order = sequence_order_indices(length, ways, balanced)
    assert sorted(order) == list(range(length))
    if balanced:  # a query sees as many keys as its index
        assert len({sum(share) for share in order.reshape(ways, -1)}) == 1
    else:
        np.testing.assert_array_equal(order, np.arange(length))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seq_len": 25},
            "data.seq_len: a sequence of 25 does not divide into 2 chunks (2 context",
        ),
        (
            {"seq_len": 26, "balanced": True},
            "two chunks each when balanced); use 24 or 28, or "
            "parallel.balance_sequence=false",
        ),
        (
            {"num_heads": 6, "num_kv_heads": 2, "method": "ulysses"},
            "ulysses splits query heads, and 6 do not divide over tensor=2·context=2; "
            "use ring or",
        ),
        (
            {"num_heads": 6, "num_kv_heads": 3, "rules": {"kv_heads": ()}},
            "3 query heads a device straddle the groups of 2 that share a kv head; "
            "split heads",
        ),
        (
            {"rules": {"heads": ()}},
            "heads are on mesh axes none, kv_heads on tensor=2; give them",
        ),
        (
            {
                "rules": {
                    "heads": ("tensor", "context"),
                    "kv_heads": ("context", "tensor"),
                }
            },
            "heads are on mesh axes tensor=2·context=2, kv_heads on "
            "context=2·tensor=2; give them",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_a_way_out(changes, message):
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "context": 2, "tensor": 2, "stage": 1}
    options = {
        "seq_len": 24,
        "num_heads": 8,
        "num_kv_heads": 8,
        "sizes": sizes,
        **changes,
    }
    rules = (
        ShardingConfig()
        .compute.for_mesh(sizes)
        .model_copy(update=changes.get("rules", {}))
    )
    with pytest.raises(MaxlmError) as error:
        check_requirements(require_context(**options | {"rules": rules}))
    assert message in str(error.value)
