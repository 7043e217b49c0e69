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
from maxlm.parallel.blocks import KeyValueBlock, _Queries
from maxlm.parallel.context import (
    SequenceSplit,
    check_context,
    sequence_order_indices,
    shard_token_indices,
)
from maxlm.sharding import ShardingConfig
from tests.pallas_kernels import reference

QUICK = {"xla_backend_optimization_level": 0}
METHODS = ("all_gather", "ring", "ulysses")

# mesh; B, S, N, K, H; mask; whether documents are packed.
CASES = {
    "packed, grouped": ({"context": 2, "tensor": 2, "fsdp": 2}, (2, 28, 8, 4, 3), {}, True),
    "window, multi-query": ({"context": 4, "tensor": 2}, (1, 24, 8, 1, 5), {"window": 5}, True),
    "fewer kv heads than tensor": ({"context": 2, "tensor": 4}, (1, 20, 8, 2, 3), {}, True),
    "window within a device": ({"context": 4, "data": 2}, (2, 32, 4, 2, 3), {"window": 3}, False),
    "three devices": ({"context": 3}, (1, 18, 6, 2, 3), {}, False),
    "no causal mask": ({"context": 3}, (2, 6, 3, 3, 4), {"causal": False}, True),
}


def rules_on(axes, kv_heads):
    rules = ShardingConfig().compute.for_mesh(dict(axes.shape))
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


# Every case by every method, in one order or the other.
PAIRS = [(case, m, (i + j) % 2 == 0) for i, case in enumerate(CASES) for j, m in enumerate(METHODS)]


@pytest.mark.parametrize(("case", "method", "balanced"), PAIRS)
def test_output_and_gradients_equal_the_reference(case, method, balanced, mesh):
    sizes, shape, mask, packed = CASES[case]
    axes = mesh(**sizes)
    rules = rules_on(axes, shape[3])
    whole = arrays(*shape)
    order = sequence_order_indices(shape[1], sizes["context"], balanced)
    options = {"method": method, "balanced": balanced, **mask}
    with jax.set_mesh(axes):
        run = jax.jit(attend_and_pull(rules, options, packed), compiler_options=QUICK)
        found = run(*laid_out(axes, rules, *(x[:, order] for x in whole)))
    q, k, v, d_o, segments = whole
    pair = (segments, segments) if packed else None
    o, _, *grads = reference.attention(q, k, v, d_o=d_o, segment_ids=pair, **mask)
    for name, a, b in zip(("o", "d_q", "d_k", "d_v"), found, (o, *grads), strict=True):
        np.testing.assert_allclose(a, b[:, order], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("method", "balanced"), [("all_gather", False), ("ring", True)])
def test_inside_a_program_that_is_manual_over_stages(method, balanced, mesh):
    """As a pipeline uses it: each stage attends in a scan and pulls its gradient there."""
    axes = mesh(stage=2, context=2, tensor=2)
    rules = rules_on(axes, 2)
    options = {"method": method, "balanced": balanced, "window": 6}
    whole = [
        np.stack(x) for x in zip(*(arrays(2, 12, 4, 2, 3, seed) for seed in range(4)), strict=True)
    ]
    order = sequence_order_indices(12, 2, balanced)
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
            np.testing.assert_allclose(np.asarray(a)[micro], b[:, order], atol=1e-5)


COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


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
        operands = laid_out(axes, rules, *arrays(1, 16, 4, 4, 3))[:4]
        attend = partial(sharded_attention, rules=rules, method=method, balanced=True)
        both = jax.jit(lambda *qkv: jax.vjp(attend, *qkv), compiler_options=QUICK)
        o, pull = both(*operands[:3])
        there = jax.jit(attend).lower(*operands[:3]).compile(compiler_options=QUICK).as_text()
        back = jax.jit(pull).lower(operands[3]).compile(compiler_options=QUICK).as_text()
    assert set(re.findall(COLLECTIVES, there)) == forward
    assert set(re.findall(COLLECTIVES, back)) == backward
    assert o.sharding.spec == operands[0].sharding.spec


def test_a_window_within_reach_of_one_neighbour_ends_the_ring_there(mesh):
    """Keys make one hop, and their gradients one back, however many devices there are."""
    axes = mesh(context=8)
    rules = rules_on(axes, 1)
    with jax.set_mesh(axes):
        operands = laid_out(axes, rules, *arrays(1, 32, 1, 1, 3))
        run = attend_and_pull(rules, {"method": "ring", "window": 5}, packed=False)
        text = jax.jit(run).lower(*operands).compile(compiler_options=QUICK).as_text()
    assert " while(" not in text
    hops = re.findall(r"collective-permute(?:-start)?\(.*source_target_pairs=\{\{0,(\d)\}", text)
    assert set(hops) == {"1", "7"}


@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize(("ways", "balanced"), [(1, True), (4, False), (4, True), (3, True)])
def test_only_what_the_mask_empties_is_skipped(ways, balanced, window, mesh):
    """Chunks of queries and keys that a device computes with are those with a pair in sight."""
    size = 3
    length = ways * size * (2 if balanced else 1)
    sees = reference.mask(length, length, window=window)[0]
    chunks = np.arange(length).reshape(-1, size)
    worth = {(a[0], b[0]) for a in chunks for b in chunks if sees[np.ix_(a, b)].any()}
    computed, work = set(), []
    with jax.set_mesh(mesh(context=ways)):
        split = SequenceSplit(("context",), "ring", balanced, True, window)
        rows = size * split.chunks
        block = KeyValueBlock(jnp.zeros((1, rows, 1, 1)), jnp.zeros((1, rows, 1, 1)), None)
        for own in range(ways):
            queries = _Queries.cut(split, jnp.int32(own), None, jnp.zeros((1, rows, 1, 1)))
            before = len(computed)
            for t in range(split.last_step(rows) + 1):
                other = (own - t) % ways
                for pair in queries.pairs(block, jnp.int32(other) if t else None):
                    if pair.live is None or pair.live:
                        starts = (split.chunk_starts(n, size) for n in (own, other))
                        a, b = (s[i] for s, i in zip(starts, (pair.query, pair.key), strict=True))
                        computed.add((a, b))
            work.append(len(computed) - before)
    assert computed == worth
    if balanced and window is None:
        assert set(work) == {2 * ways + 1}  # of 4 · ways without the mask


@given(st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_the_order_deals_out_each_token_once_with_equal_causal_work(ways, size, balanced):
    length = ways * size * (2 if balanced else 1)
    order = sequence_order_indices(length, ways, balanced)
    assert sorted(order) == list(range(length))
    shares = order.reshape(ways, -1)
    for number, share in enumerate(shares):
        np.testing.assert_array_equal(
            shard_token_indices(np.int32(number), length, ways, balanced), share
        )
    if balanced:
        assert len({sum(share) for share in shares}) == 1  # a query sees as many keys as its index
    else:
        np.testing.assert_array_equal(order, np.arange(length))


def refused(seq_len=24, heads=8, kv_heads=8, *, rules=None, sizes=None, **options) -> str:
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "context": 2, "tensor": 2, "stage": 1} | (
        sizes or {}
    )
    rules = ShardingConfig().compute.for_mesh(sizes).model_copy(update=rules or {})
    with pytest.raises(MaxlmError) as error:
        check_context(seq_len, heads, kv_heads, rules=rules, sizes=sizes, **options)
    return str(error.value)


def test_sizes_that_do_not_divide_are_refused_with_a_way_out():
    assert refused(25) == (
        "data.seq_len: a sequence of 25 does not divide into 2 chunks (2 context shards); use 24 "
        "or 26"
    )
    assert refused(26, balanced=True) == (
        "data.seq_len: a sequence of 26 does not divide into 4 chunks (2 context shards, two "
        "chunks each when balanced); use 24 or 28, or parallel.balance_sequence=false"
    )
    assert refused(heads=6, kv_heads=2, method="ulysses") == (
        "parallel.context: ulysses splits query heads, and 6 do not divide over "
        "tensor=2·context=2; use ring or all_gather, or fewer devices on these axes"
    )
    assert refused(heads=6, kv_heads=3, rules={"kv_heads": ()}, sizes={"tensor": 2}) == (
        "sharding.compute.kv_heads: 3 query heads a device straddle the groups of 2 that share a "
        "kv head; split heads over a multiple or a divisor of 3 devices"
    )
    assert refused(rules={"heads": ()}) == (
        "sharding.compute.kv_heads: heads are on mesh axes none, kv_heads on tensor=2; give them "
        "the axes of heads, or null"
    )
    assert refused(window=0) == (
        "model.attention.window: a window of 0 tokens; use 1 or more, or null for no window"
    )


def test_attention_itself_refuses_before_anything_is_compiled(mesh):
    axes = mesh(context=2)
    rules = rules_on(axes, 1)
    with jax.set_mesh(axes):
        q, k, v, _, segments = laid_out(axes, rules, *arrays(1, 6, 1, 1, 3))
        attend = partial(jax.eval_shape, partial(sharded_attention, rules=rules, balanced=True))
        with pytest.raises(MaxlmError, match="6 does not divide into 4 chunks"):
            attend(q, k, v)
        place = partial(sharded_attention, rules=rules, q_positions=segments)
        with pytest.raises(ValueError, match="over the tokens of the batch alone"):
            jax.eval_shape(place, q, k, v)
