"""linear_cross_entropy() equals a float64 NumPy loss, its gradients too, in both implementations;
the TPU kernels run as a TPU would, and what no one has written there is NaN."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.chips import CHIPS
from pallas_kernels.linear_cross_entropy import (
    CrossEntropyBlocks,
    CrossEntropyTiling,
    linear_cross_entropy,
    loss_and_gradients,
)
from pallas_kernels.linear_cross_entropy.blocks import can_tile, choose_tiling, part_rows_size

SMALL = CrossEntropyTiling(CrossEntropyBlocks(128, 128), CrossEntropyBlocks(128, 128))
AS_TPU = pltpu.InterpretParams(uninitialized_memory="nan")


def reference(hidden, head, targets, weights, z_loss=0.0, soft_cap=None, bias=None):
    """The loss, the cross-entropy and the loss's gradients, from every logit; a bias's last."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits, slope = hidden @ head, 1.0
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
        slope = 1 - (logits / soft_cap) ** 2
    top = logits.max(axis=1, keepdims=True)
    exp = np.exp(logits - top)
    lse = top[:, 0] + np.log(exp.sum(axis=1))
    onehot = (np.arange(head.shape[1]) == np.asarray(targets)[:, None]).astype(np.float64)
    entropy = np.sum(weights * (lse - np.sum(onehot * logits, axis=1)))
    softmax = exp / exp.sum(axis=1, keepdims=True)
    d_logits = softmax * (1 + 2 * z_loss * lse)[:, None] - onehot
    d_logits *= weights[:, None] * slope
    loss = entropy + z_loss * np.sum(weights * lse**2)
    gradients = d_logits @ head.T, hidden.T @ d_logits, d_logits.sum(axis=0)
    return loss, entropy, *(gradients if bias is not None else gradients[:2])


def operands(T, D, V, *, scale=1.0, seed=0):
    """hidden, head, targets of which some are out of range and have no weight, weights."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((T, D)).astype(np.float32)
    head = (scale * D**-0.5 * rng.standard_normal((D, V))).astype(np.float32)
    targets = rng.integers(0, V, T)
    ignored = rng.random(T) < 0.2
    targets = np.where(ignored, rng.choice([-100, -1, V, V + 3], T), targets).astype(np.int32)
    weights = np.where(ignored, 0, rng.random(T)).astype(np.float32)
    return hidden, head, targets, weights


def offsets(V):
    """A bias."""
    return np.random.default_rng(7).standard_normal(V).astype(np.float32)


def found(arguments, bias=None, **options):
    """As the reference's, by the public function."""

    def loss(hidden, head, *bias):
        given = {"bias": bias[0]} if bias else {}
        return linear_cross_entropy(hidden, head, *arguments[2:], **given, **options)

    by = (*arguments[:2], *(() if bias is None else (bias,)))
    run = jax.jit(jax.value_and_grad(loss, tuple(range(len(by))), has_aux=True))
    (total, entropy), gradients = run(*by)
    assert [g.dtype for g in gradients] == [x.dtype for x in by]
    return total, entropy, *gradients


def agree(found, exact, tolerance):
    for own, true in zip(found, exact, strict=True):
        scale = max(1.0, np.abs(true).max())
        np.testing.assert_allclose(np.asarray(own, np.float64), true, atol=tolerance * scale)


@settings(max_examples=8)
@given(
    st.sampled_from([1, 5, 16, 33]),
    st.sampled_from([1, 7, 32]),
    st.sampled_from([1, 2, 97, 128]),
    st.sampled_from([1, 4, 16, 100]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_chunks_equal_the_reference(T, D, V, chunk, z_loss, soft_cap, biased, seed):
    arguments = operands(T, D, V, scale=3.0, seed=seed)
    options = {"z_loss": z_loss, "soft_cap": soft_cap, "bias": offsets(V) if biased else None}
    agree(found(arguments, chunk=chunk, **options), reference(*arguments, **options), 3e-6)


@pytest.mark.parametrize(
    ("T", "D", "V", "scale", "options"),
    [
        (130, 24, 300, 3.0, {"soft_cap": 5.0, "z_loss": 0.1}),  # blocks each way, with odd ends
        (3, 8, 129, 200.0, {}),  # logits beyond what exp takes
        (7, 130, 1, 1.0, {}),  # nothing but the target
    ],
)
def test_the_tpu_kernels_equal_the_reference(T, D, V, scale, options):
    arguments = operands(T, D, V, scale=scale)
    own = found(arguments, implementation="tpu", blocks=SMALL, interpret=AS_TPU, **options)
    agree(own, reference(*arguments, **options), 3e-6 * max(1, scale / 4))


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_error_in_bfloat16_is_that_of_rounding(implementation):
    """A confident token's gradient is a small difference: it keeps its digits."""
    hidden, head, targets, weights = operands(64, 128, 256, scale=2.0)
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    sure = np.arange(0, 64, 2)
    targets[sure], weights[sure] = 5, 1.0
    hidden = hidden.at[sure].set(head[:, 5] * 2.5)
    arguments = hidden, head, targets, weights
    options = {"blocks": SMALL, "interpret": AS_TPU} if implementation == "tpu" else {}
    _, _, d_hidden, d_head = found(arguments, implementation=implementation, **options)
    _, _, true_hidden, true_head = reference(*arguments)
    assert np.abs(true_hidden[sure]).max() < 0.3 * np.abs(true_hidden).max()
    for rows in (sure, sure + 1):
        error = np.asarray(d_hidden, np.float64)[rows] - true_hidden[rows]
        assert np.sqrt(np.mean(error**2)) < 4e-3 * np.sqrt(np.mean(true_hidden[rows] ** 2))
    error = np.asarray(d_head, np.float64) - true_head
    assert np.sqrt(np.mean(error**2)) < 4e-3 * np.sqrt(np.mean(true_head**2))


def test_gradients_are_those_of_finite_differences():
    arguments = operands(6, 5, 11, scale=2.0)
    arguments = (*arguments, 0.2, 3.0, offsets(11))
    names = ("z_loss", "soft_cap", "bias")
    gradients = found(arguments[:4], **dict(zip(names, arguments[4:], strict=True)))[2:]
    rng = np.random.default_rng(1)
    for which, gradient in zip((0, 1, 6), gradients, strict=True):
        step = rng.standard_normal(arguments[which].shape)
        moved = [list(arguments), list(arguments)]
        for way, sign in zip(moved, (1, -1), strict=True):
            way[which] = np.asarray(arguments[which], np.float64) + sign * 1e-5 * step
        slope = np.subtract(*(reference(*way)[0] for way in moved)) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * step), slope, rtol=1e-5)


def test_only_the_loss_without_gradients_is_computed_where_none_is_wanted():
    arguments = operands(5, 6, 200)
    exact = reference(*arguments, 0.1)[:2]
    options = {"z_loss": 0.1, "implementation": "tpu", "blocks": SMALL, "interpret": AS_TPU}
    agree(linear_cross_entropy(*arguments, **options), exact, 1e-6)
    jaxpr = str(jax.make_jaxpr(partial(linear_cross_entropy, **options))(*arguments))
    assert "head_gradient" not in jaxpr


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_shares_of_the_vocabulary_give_the_whole(implementation):
    T, D, V = 9, 8, 320
    arguments = operands(T, D, V, scale=2.0)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    options = {"blocks": SMALL, "interpret": AS_TPU} if implementation == "tpu" else {}

    def share(hidden, head, targets, weights, number):
        sums, (d_hidden, d_head, _) = loss_and_gradients(
            *(hidden, head, targets, weights),
            first=number[0] * head.shape[1],
            axes=("tensor",),
            z_loss=0.1,
            implementation=implementation,
            **options,
        )
        return *sums, jax.lax.psum(d_hidden, "tensor"), d_head

    specs = (whole, split, whole, whole, PartitionSpec("tensor"))
    out = (whole, whole, whole, split)
    run = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    own = jax.jit(run)(*arguments, np.arange(2, dtype=np.int32))
    agree(own, reference(*arguments, 0.1), 3e-6)


def test_a_bias_is_left_to_xla():
    """Also in a program for a TPU, whose kernel would take what is the same without one."""
    arguments, bias = operands(4, 8, 16), offsets(16)
    for added, has_kernel in ((None, True), (bias, False)):
        run = jax.jit(lambda *a, bias=added: linear_cross_entropy(*a, bias=bias))
        text = run.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
        assert ("tpu_custom_call" in text) == has_kernel


@given(
    st.integers(1, 20_000),
    st.integers(1, 16_384),
    st.integers(1, 300_000),
    st.sampled_from([(16, 128), (64, 128), (64, 256), (128, 256)]),
)
def test_blocks_fit_fill_the_matrix_unit_and_waste_little(T, D, V, of_chip):
    mebibytes, width = of_chip
    chip = CHIPS["v5p"]._replace(vmem=mebibytes << 20, mxu=width)
    if not can_tile((T, D), V, jnp.bfloat16, chip):
        assert mebibytes == 16
        assert D > 4096
        return
    for blocks in choose_tiling((T, D), V, jnp.bfloat16, chip):
        assert blocks.vocab % width == 0 or blocks.vocab == 128
        for count, size in ((T, blocks.tokens), (V, blocks.vocab)):
            assert -(-count // size) * size < max(1.07 * count, count + width)
            assert size % part_rows_size(size, chip) == 0
            assert part_rows_size(size, chip) % 16 == 0


LARGE = CrossEntropyTiling(CrossEntropyBlocks(2048, 8192), CrossEntropyBlocks(128, 128))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": np.zeros((7, 16), np.float32)}, r"\(4, 8\).*\(7, 16\)"),
        ({"head": np.zeros((8, 16), np.float16)}, "float32, float16"),
        ({"soft_cap": 0.0}, "soft_cap.*0.0"),
        ({"bias": np.zeros(16, np.float32)}, "tpu.*no bias"),
        ({"blocks": LARGE}, r"\(2048, 8192\).*D = 8.*VMEM"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message):
    arguments = dict(zip(("hidden", "head", "targets", "weights"), operands(4, 8, 16), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, "implementation": "tpu", **change})
