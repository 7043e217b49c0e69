"""causal_conv() equals a float64 loop over each token's own document, however the row
is cut into runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.causal_conv import causal_conv, update_conv_state


def find_document(history, starts):
    """Inputs [n, C] of the last token's document: from the last start on."""
    begins = np.flatnonzero(starts)
    return history[begins[-1] :] if len(begins) else history


def reference(x, weight, bias, starts, state, silu, live):
    """y and the state after the live tokens, in float64, token by token."""
    x, weight, bias, state = (
        np.asarray(a, np.float64) for a in (x, weight, bias, state)
    )
    num_rows, num_tokens, channels = x.shape
    width = weight.shape[1]
    y = np.zeros_like(x)
    end = np.zeros((num_rows, width - 1, channels))
    for row in range(num_rows):
        history = np.concatenate([state[row], x[row]])
        row_starts = np.concatenate([np.zeros(width - 1, bool), starts[row]])
        for token in range(num_tokens):
            seen = token + width
            document = find_document(history[:seen], row_starts[:seen])[-width:]
            total = bias + np.sum(document * weight.T[width - len(document) :], axis=0)
            y[row, token] = total / (1 + np.exp(-total)) if silu else total
        seen = width - 1 + live[row].sum()
        document = find_document(history[:seen], row_starts[:seen])
        document = document[max(0, len(document) - width + 1) :]
        end[row, width - 1 - len(document) :] = document
    return y, end


def draw(num_rows, num_tokens, channels, width, seed):
    """x, weight, bias, starts (row 0 begins with one), and a state."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (num_rows, num_tokens, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "state": (num_rows, width - 1, channels),
    }
    arrays = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    arrays["starts"] = rng.random((num_rows, num_tokens)) < 0.25
    arrays["starts"][0, 0] = True
    return arrays


@partial(jax.jit, static_argnames="activation")
def convolve(x, weight, bias, starts, state, activation=None, live=None):
    return causal_conv(
        x,
        weight,
        bias,
        starts=starts,
        initial_state=state,
        live=live,
        activation=activation,
    )


@pytest.mark.heavy
@settings(max_examples=15)
@given(
    st.sampled_from([1, 2, 3, 13]),
    st.sampled_from([1, 2, 4, 7]),
    st.sampled_from([None, "silu"]),
    st.integers(0, 99),
)
def test_each_token_sees_its_own_documents_window(num_tokens, width, activation, seed):
    arrays = draw(3, num_tokens, 5, width, seed)
    live = np.arange(num_tokens) < np.array([[num_tokens], [num_tokens // 2], [0]])
    y, state = convolve(**arrays, activation=activation, live=live)
    true_y, true_state = reference(**arrays, silu=activation is not None, live=live)
    np.testing.assert_allclose(y, true_y, rtol=0, atol=2e-6)
    np.testing.assert_allclose(state, true_state, rtol=0, atol=0)
    all_live = np.ones_like(live)
    state = update_conv_state(arrays["x"], width, arrays["starts"], arrays["state"])
    _, true_state = reference(**arrays, silu=False, live=all_live)
    np.testing.assert_allclose(state, true_state, rtol=0, atol=0)


def test_a_row_in_runs_equals_the_row():
    """Runs of 1 to 5 tokens, with padding behind them that holds NaN."""
    arrays = draw(2, 17, 3, 4, seed=3)
    whole, end = convolve(**arrays, activation="silu")
    state = arrays["state"]
    outputs = []
    position = 0
    for length in (1, 5, 1, 2, 4, 3, 1):
        span = slice(position, position + length)
        position += length
        padding = ((0, 0), (0, 5 - length))
        x = np.pad(arrays["x"][:, span], (*padding, (0, 0)), constant_values=np.nan)
        starts = np.pad(arrays["starts"][:, span], padding, constant_values=True)
        live = np.broadcast_to(np.arange(5) < length, (2, 5))
        run = arrays | {"x": x, "starts": starts, "state": state}
        y, state = convolve(**run, activation="silu", live=live)
        outputs.append(y[:, :length])
    np.testing.assert_allclose(np.concatenate(outputs, 1), whole, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(state, end)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_are_those_of_the_loop(activation):
    """Against central differences of the float64 loop, along random directions; the
    state's part of the loss as well."""
    arrays = draw(2, 9, 3, 4, seed=5)
    live = np.arange(9) < np.array([[9], [6]])
    rng = np.random.default_rng(6)
    by_y = rng.standard_normal((2, 9, 3)) * live[:, :, None]
    by_state = rng.standard_normal((2, 3, 3))
    starts = arrays.pop("starts")

    def loss(arrays):
        y, state = convolve(**arrays, starts=starts, activation=activation, live=live)
        return jnp.sum(by_y * y) + jnp.sum(by_state * state)

    def true_loss(arrays):
        silu = activation is not None
        y, state = reference(**arrays, starts=starts, silu=silu, live=live)
        return np.sum(by_y * y) + np.sum(by_state * state)

    gradients = jax.grad(loss)(arrays)
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        values = [
            true_loss(arrays | {name: arrays[name] + step * direction})
            for step in (1e-5, -1e-5)
        ]
        slope = (values[0] - values[1]) / 2e-5
        assert np.sum(gradient * direction) == pytest.approx(slope, abs=1e-4), name


def test_the_backward_pass_keeps_inputs_alone():
    """Of 16 bits, too, which sums do not widen."""
    x = jnp.ones((2, 64, 8), jnp.bfloat16)
    weight = jnp.ones((8, 4), jnp.float32)
    starts = jnp.zeros((2, 64), bool)

    def convolve(x, weight):
        return causal_conv(x, weight, starts=starts, activation="silu")[0]

    y, pullback = jax.vjp(convolve, x, weight)
    assert y.dtype == jnp.bfloat16
    kept_bytes = sum(array.nbytes for array in jax.tree.leaves(pullback))
    assert kept_bytes <= x.nbytes + weight.nbytes + 2 * starts.nbytes
    assert [d.dtype for d in pullback(y)] == [x.dtype, weight.dtype]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.zeros((5, 4))}, r"x \(2, 6, 3\), weight \(5, 4\)"),
        (
            {"state": np.zeros((2, 4, 3))},
            r"initial_state \(2, 4, 3\): want \(2, 3, 3\)",
        ),
        ({"starts": np.zeros((2, 5), bool)}, r"starts \(2, 5\): want \(2, 6\)"),
        ({"x": np.zeros((2, 0, 3))}, "no size may be 0"),
        ({"activation": "gelu"}, "'silu' or None; got 'gelu'"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convolve(**draw(2, 6, 3, 4, seed=0) | change)
