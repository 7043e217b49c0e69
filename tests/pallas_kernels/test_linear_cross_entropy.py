"""linear_cross_entropy() equals a float64 NumPy loss, its gradients too; over a
vocabulary in shares see tests/parallel/test_cross_entropy.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.linear_cross_entropy import linear_cross_entropy


def reference(hidden, head, targets, weights, z_loss=0.0, soft_cap=None, bias=None):
    """The loss, the cross-entropy and the loss's gradients, from every logit; a bias's
    last."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = hidden @ head
    slope = 1.0
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
        slope = 1 - (logits / soft_cap) ** 2
    top = logits.max(axis=1, keepdims=True)
    exp = np.exp(logits - top)
    lse = top[:, 0] + np.log(exp.sum(axis=1))
    onehot = (np.arange(head.shape[1]) == np.asarray(targets)[:, None]).astype(
        np.float64
    )
    entropy = np.sum(weights * (lse - np.sum(onehot * logits, axis=1)))
    softmax = exp / exp.sum(axis=1, keepdims=True)
    d_logits = softmax * (1 + 2 * z_loss * lse)[:, None] - onehot
    d_logits *= weights[:, None] * slope
    loss = entropy + z_loss * np.sum(weights * lse**2)
    gradients = d_logits @ head.T, hidden.T @ d_logits, d_logits.sum(axis=0)
    return loss, entropy, *(gradients if bias is not None else gradients[:2])


def operands(T, D, V, *, scale=1.0, seed=0):
    """hidden, head, targets of which some are out of range and have no weight,
    weights."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((T, D)).astype(np.float32)
    head = (scale * D**-0.5 * rng.standard_normal((D, V))).astype(np.float32)
    targets = rng.integers(0, V, T)
    ignored = rng.random(T) < 0.2
    targets = np.where(ignored, rng.choice([-100, -1, V, V + 3], T), targets).astype(
        np.int32
    )
    weights = np.where(ignored, 0, rng.random(T)).astype(np.float32)
    return hidden, head, targets, weights


def compute(arguments, bias=None, z_loss=0.0, soft_cap=None, chunk_tokens=1024):
    """As the reference's, by the public function."""

    def loss(hidden, head, bias):
        return linear_cross_entropy(
            hidden,
            head,
            *arguments[2:],
            bias=bias,
            z_loss=z_loss,
            soft_cap=soft_cap,
            chunk_tokens=chunk_tokens,
        )

    by = (*arguments[:2], bias)
    argnums = range(2 if bias is None else 3)
    run = jax.jit(jax.value_and_grad(loss, tuple(argnums), has_aux=True))
    (total, entropy), gradients = run(*by)
    assert [g.dtype for g in gradients] == [by[i].dtype for i in argnums]
    return total, entropy, *gradients


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
    bias = (
        np.random.default_rng(7).standard_normal(V).astype(np.float32)
        if biased
        else None
    )
    options = {"z_loss": z_loss, "soft_cap": soft_cap, "bias": bias}
    true = reference(*arguments, **options)
    results = compute(arguments, chunk_tokens=chunk, **options)
    for value, exact in zip(results, true, strict=True):
        np.testing.assert_allclose(
            value, exact, atol=3e-6 * max(1.0, np.abs(exact).max())
        )


def test_error_in_bfloat16_is_that_of_rounding():
    """A confident token's gradient is a small difference: it keeps its digits."""
    hidden, head, targets, weights = operands(64, 128, 256, scale=2.0)
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    sure = np.arange(0, 64, 2)
    targets[sure], weights[sure] = 5, 1.0
    arguments = hidden.at[sure].set(head[:, 5] * 2.5), head, targets, weights
    _, _, d_hidden, d_head = (np.asarray(x, np.float64) for x in compute(arguments))
    _, _, true_hidden, true_head = reference(*arguments)
    assert np.abs(true_hidden[sure]).max() < 0.3 * np.abs(true_hidden).max()
    rows = [(d_hidden[at], true_hidden[at]) for at in (sure, sure + 1)]
    for value, exact in (*rows, (d_head, true_head)):
        assert np.sqrt(np.mean((value - exact) ** 2)) < 4e-3 * np.sqrt(
            np.mean(exact**2)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": np.zeros((7, 16), np.float32)}, r"\(4, 8\).*\(7, 16\)"),
        ({"head": np.zeros((8, 16), np.float16)}, "float32, float16"),
        ({"soft_cap": 0.0}, "soft_cap.*0.0"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message):
    arguments = dict(
        zip(("hidden", "head", "targets", "weights"), operands(4, 8, 16), strict=True)
    )
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})
