"""Linear recurrences over rows that are split over devices, in order and in balanced
order, within pipeline stages or not, equal those of one device, and so do their
gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.config import MaxlmError
from maxlm.parallel.causal_conv import sharded_causal_conv
from maxlm.parallel.context import sequence_order_indices
from maxlm.parallel.linear_recurrence import (
    advance_linear_recurrence,
    sharded_linear_recurrence,
    spread_groups,
)
from maxlm.parallel.local import SplitArray
from maxlm.sharding.rules import ComputeRules
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.linear_recurrence import (
    find_segment_starts,
    linear_recurrence_reference,
)
from tests.models.building import QUICK

B, S, H, N, K, V, W = 2, 24, 2, 4, 3, 5, 6
# Row 0: documents of one token to several runs, and padding. Row 1: two documents.
SEGMENTS = np.array(
    [[1] * 2 + [2] + [3] * 13 + [4] * 5 + [0] * 3, [1] * 12 + [2] * 12], np.int32
)
SCALE = 0.7
KINDS = ("by head", "by channel", "no delta rule")


def draw(kind, seed=0):
    """q, k, v, log decay, beta if there is one, and the output's cotangent."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((B, S, H, K))
    k = rng.standard_normal((B, S, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((B, S, N, V))
    shape = (B, S, N, K) if kind == "by channel" else (B, S, N)
    arrays = [q, k, v, -rng.uniform(0, 2, shape)]
    if kind != "no delta rule":
        arrays.append(rng.uniform(0, 2, (B, S, N)))
    arrays.append(rng.standard_normal((B, S, N, V)))
    return [array.astype(np.float32) for array in arrays]


def pull(function, operands, d_y):
    """The output, and the operands' gradients."""
    y, backward = jax.vjp(function, *operands)
    return y, *backward(d_y)


def compute_truth(arrays, segment_ids):
    """Token by token, on one device."""
    *operands, d_y = arrays
    starts = find_segment_starts(segment_ids)

    def recur(*operands):
        y, _ = linear_recurrence_reference(*operands, starts=starts, scale=SCALE)
        return y

    return jax.jit(lambda: pull(recur, operands, d_y))()


def assert_close(result, truth, order):
    for place, (array, want) in enumerate(zip(result, truth, strict=True)):
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(
            array,
            np.asarray(want)[:, order],
            rtol=0,
            atol=1e-6 * scale,
            err_msg=f"array {place}",
        )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "sizes", "balanced"),
    [
        ("by channel", {"context": 4, "tensor": 2}, True),
        *(
            pytest.param(kind, sizes, balanced, marks=pytest.mark.more)
            for kind in KINDS
            for sizes in ({"context": 2, "data": 2}, {"context": 4, "tensor": 2})
            for balanced in (False, True)
            if (kind, balanced) != ("by channel", True)
        ),
    ],
)
def test_rows_on_several_devices_equal_rows_on_one(kind, sizes, balanced, mesh):
    axes = mesh(**sizes)
    rules = ComputeRules().for_mesh(dict(axes.shape))
    order = sequence_order_indices(S, sizes["context"], balanced)
    arrays = draw(kind)

    def recur(segment_ids, *operands):
        return sharded_linear_recurrence(
            *operands,
            scale=SCALE,
            chunk_size=4,
            rules=rules,
            segment_ids=segment_ids,
            balanced=balanced,
        )

    with jax.set_mesh(axes):
        by_head = NamedSharding(axes, rules.spec("batch", "seq", "heads"))
        rows = NamedSharding(axes, rules.spec("batch", "seq"))
        *operands, d_y = jax.device_put([x[:, order] for x in arrays], by_head)
        segment_ids = jax.device_put(SEGMENTS[:, order], rows)

        def run(segment_ids, operands, d_y):
            return pull(lambda *x: recur(segment_ids, *x), operands, d_y)

        result = jax.jit(run, compiler_options=QUICK)(segment_ids, operands, d_y)
    assert_close(result, compute_truth(arrays, SEGMENTS), order)


@pytest.mark.more
@pytest.mark.heavy
def test_within_stages(mesh):
    """As a pipeline uses it: manual over stages, each with operands of its own."""
    axes = mesh(stage=2, context=2, tensor=2)
    rules = ComputeRules().for_mesh(dict(axes.shape))
    order = sequence_order_indices(S, 2, balanced=True)
    by_stage = [draw("by head", seed) for seed in range(2)]

    def stage(arrays, segment_ids):
        *operands, d_y = (x[0] for x in arrays)

        def recur(*operands):
            return sharded_linear_recurrence(
                *operands,
                scale=SCALE,
                chunk_size=8,
                rules=rules,
                segment_ids=segment_ids,
                balanced=True,
            )

        return [x[None] for x in pull(recur, operands, d_y)]

    specs = PartitionSpec("stage")
    with jax.set_mesh(axes):
        layout = PartitionSpec("stage", *rules.spec("batch", "seq", "heads"))
        arrays = [
            jax.device_put(np.stack(parts)[:, :, order], NamedSharding(axes, layout))
            for parts in zip(*by_stage, strict=True)
        ]
        rows = NamedSharding(axes, rules.spec("batch", "seq"))
        segment_ids = jax.device_put(SEGMENTS[:, order], rows)
        run = jax.shard_map(
            stage,
            in_specs=(specs, PartitionSpec()),
            out_specs=specs,
            axis_names={"stage"},
            check_vma=False,
        )
        result = jax.jit(run, compiler_options=QUICK)(arrays, segment_ids)
    for number, arrays in enumerate(by_stage):
        truth = compute_truth(arrays, SEGMENTS)
        assert_close([np.asarray(x)[number] for x in result], truth, order)


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.parametrize("balanced", [False, True])
def test_convolutions_of_heads_over_runs_shorter_than_they_see(balanced, mesh):
    """Runs of three tokens, and six that a token sees: inputs come from two runs
    before."""
    axes = mesh(context=4, tensor=2)
    rules = ComputeRules().for_mesh(dict(axes.shape))
    order = sequence_order_indices(S, 4, balanced)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, S, N, V)).astype(np.float32)
    weight = rng.standard_normal((N, V, W)).astype(np.float32)
    bias = rng.standard_normal((N, V)).astype(np.float32)
    d_y = rng.standard_normal(x.shape).astype(np.float32)

    def convolve(x, weight, bias):
        y, _ = causal_conv(
            x.reshape(B, S, -1),
            weight.reshape(-1, W),
            bias.reshape(-1),
            starts=find_segment_starts(SEGMENTS),
            activation="silu",
        )
        return y.reshape(x.shape)

    truth = jax.jit(lambda: pull(convolve, (x, weight, bias), d_y))()
    with jax.set_mesh(axes):
        by_head = NamedSharding(axes, rules.spec("batch", "seq", "heads"))
        rows = NamedSharding(axes, rules.spec("batch", "seq"))
        params = NamedSharding(axes, rules.spec("heads"))
        segment_ids = jax.device_put(SEGMENTS[:, order], rows)

        def convolve_split(x, weight, bias):
            return sharded_causal_conv(
                SplitArray(x, ("heads", None)),
                weight,
                bias,
                activation="silu",
                rules=rules,
                segment_ids=segment_ids,
                balanced=balanced,
            )

        placed = (
            jax.device_put(x[:, order], by_head),
            *jax.device_put((weight, bias), params),
        )
        placed_d_y = jax.device_put(d_y[:, order], by_head)
        run = jax.jit(lambda operands, d_y: pull(convolve_split, operands, d_y))
        result = run(placed, placed_d_y)
    assert_close(result[:2], truth[:2], order)
    for array, want in zip(result[2:], truth[2:], strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(array, want, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize(("groups", "ways"), [(2, 4), (4, 2), (2, 2)])
def test_groups_of_keys_go_to_the_devices_that_read_them(groups, ways, mesh):
    axes = mesh(tensor=ways)
    rules = ComputeRules().for_mesh(dict(axes.shape))
    num_heads = 8
    x = np.arange(float(3 * groups)).reshape(1, 3, groups, 1)

    def read(x):
        keys = spread_groups(x, num_heads, rules)
        # Each value head of a device reads one of the device's keys.
        return jnp.repeat(
            keys,
            num_heads // keys.shape[2],
            axis=2,
            out_sharding=rules.spec("batch", "seq", "heads", None),
        )

    with jax.set_mesh(axes):
        placed = jax.device_put(x, NamedSharding(axes, PartitionSpec()))
        keys, d_x = jax.jit(
            lambda x: pull(read, (x,), jnp.ones_like(jax.eval_shape(read, x)))
        )(placed)
    np.testing.assert_array_equal(keys, np.repeat(x, num_heads // groups, axis=2))
    np.testing.assert_array_equal(d_x, np.full(x.shape, num_heads // groups))


def test_groups_that_heads_of_a_device_straddle_are_refused(mesh):
    axes = mesh(tensor=2)
    rules = ComputeRules().for_mesh(dict(axes.shape))
    with jax.set_mesh(axes), pytest.raises(ValueError, match="3 value heads a device"):
        spread_groups(jnp.zeros((1, 2, 3, 4)), 6, rules)


def test_a_sequence_that_does_not_divide_is_refused(mesh):
    axes = mesh(context=2)
    rules = ComputeRules().for_mesh(dict(axes.shape))
    q = jnp.zeros((1, 6, 1, 2))
    decay = jnp.zeros((1, 6, 1))
    with (
        jax.set_mesh(axes),
        pytest.raises(MaxlmError, match="a sequence of 6 does not"),
    ):
        sharded_linear_recurrence(q, q, q, decay, rules=rules, balanced=True)


@pytest.mark.parametrize("kind", ["by channel", "no delta rule"])
def test_steps_of_a_row_are_the_row(kind):
    """One token, then several of which the last are not live, then the others."""
    *operands, _ = draw(kind)
    want, last = linear_recurrence_reference(*operands, scale=SCALE)
    state = np.zeros((B, N, K, V), np.float32)
    outputs = []
    for first, num_live, num_tokens in ((0, 1, 1), (1, 5, 8), (6, S - 6, S - 6)):
        tokens = [x[:, first : first + num_tokens] for x in operands]
        live = np.broadcast_to(np.arange(num_tokens) < num_live, (B, num_tokens))
        y, state = advance_linear_recurrence(
            *tokens, state=state, live=live, scale=SCALE, chunk_size=4
        )
        outputs.append(y[:, :num_live])
    result = np.concatenate(outputs, axis=1)
    np.testing.assert_allclose(result, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=0, atol=1e-5)
