"""selective_scan() equals a float64 loop over tokens, however a row is cut into chunks
and runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.selective_scan import (
    combine_scans,
    selective_scan,
    selective_scan_step,
    summarize_scan,
)

FLOATS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def reference(x, dt, A, B, C, D, initial_state, starts, dt_bias=None, live=None):
    """y and the state after the live tokens, in float64, token by token."""
    x, dt, A, B, C, D = (np.asarray(a, np.float64) for a in (x, dt, A, B, C, D))
    if dt_bias is not None:
        dt = np.log1p(np.exp(dt + np.asarray(dt_bias, np.float64)))
    state = np.array(initial_state, np.float64)
    live = np.ones_like(starts) if live is None else live
    y = np.zeros(x.shape)
    for row, token in np.ndindex(*starts.shape):
        if not live[row, token]:
            continue
        step = dt[row, token][:, None]
        before = 0 if starts[row, token] else np.exp(step * A) * state[row]
        inflow = step * x[row, token][:, None] * B[row, token]
        state[row] = before + inflow
        y[row, token] = state[row] @ C[row, token] + D * x[row, token]
    return y, state


def draw(
    num_rows, num_tokens, channels, num_states, seed, share_of_starts=0.15, biased=True
):
    """Arguments by name; decays from almost none to almost all of the state."""
    rng = np.random.default_rng(seed)
    by_token = num_rows, num_tokens
    arrays = {
        "x": rng.standard_normal((*by_token, channels)),
        "dt": np.exp(rng.uniform(np.log(1e-3), np.log(2), (*by_token, channels))),
        "A": -np.exp(rng.uniform(-2, 2.7, (channels, num_states))),
        "B": rng.standard_normal((*by_token, num_states)),
        "C": rng.standard_normal((*by_token, num_states)),
        "D": rng.standard_normal(channels),
        "initial_state": rng.standard_normal((num_rows, channels, num_states)),
    }
    if biased:  # softplus(dt + dt_bias) are the step sizes above, but for its bend
        arrays["dt_bias"] = rng.standard_normal(channels)
        arrays["dt"] = np.log(np.expm1(arrays["dt"])) - 0.5 * arrays["dt_bias"]
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return arrays | {"starts": rng.random(by_token) < share_of_starts}


scan = jax.jit(selective_scan, static_argnames="chunk_tokens")


def near(result, truth, tolerance):
    scale = max(1.0, np.abs(truth).max())
    np.testing.assert_allclose(result, truth, rtol=0, atol=tolerance * scale)


@pytest.mark.heavy
@settings(max_examples=12)
@given(
    st.sampled_from([1, 2, 7, 8, 9, 31]),
    st.sampled_from([1, 8, 64]),
    st.sampled_from([0, 0.15, 1]),
    st.booleans(),
    st.integers(0, 99),
)
def test_chunks_equal_the_loop(num_tokens, chunk_tokens, share_of_starts, biased, seed):
    arrays = draw(3, num_tokens, 5, 3, seed, share_of_starts, biased)
    live = np.arange(num_tokens) < np.array([[num_tokens], [num_tokens // 2], [0]])
    true_y, true_state = reference(**arrays, live=live)
    for name in ("x", "dt", "B", "C"):
        arrays[name][~live] = np.nan  # padding
    arrays["starts"][~live] = True
    y, state = scan(**arrays, live=live, chunk_tokens=chunk_tokens)
    near(np.asarray(y)[live], true_y[live], 2e-6)
    near(state, true_state, 2e-6)


def test_a_row_in_runs_equals_the_row():
    """Runs of several lengths, and tokens by themselves."""
    arrays = draw(2, 23, 5, 3, seed=4)
    whole, end = scan(**arrays, chunk_tokens=8)
    state = arrays["initial_state"]
    outputs = []
    position = 0
    for length in (1, 9, 5, 1, 7):
        span = slice(position, position + length)
        position += length
        by_token = {k: arrays[k][:, span] for k in ("x", "dt", "B", "C", "starts")}
        run = arrays | by_token | {"initial_state": state}
        y, state = scan(**run, chunk_tokens=4)
        outputs.append(y)
    near(np.concatenate(outputs, 1), whole, 1e-6)
    near(state, end, 1e-6)

    state = jnp.asarray(arrays["initial_state"])
    for token in range(23):
        state = jnp.where(arrays["starts"][:, token, None, None], 0, state)
        x, dt, B, C = (arrays[name][:, token] for name in ("x", "dt", "B", "C"))
        A, D, dt_bias = (arrays[name] for name in ("A", "D", "dt_bias"))
        y, state = selective_scan_step(state, x, dt, A, B, C, D, dt_bias)
        near(y, whole[:, token], 1e-6)
    near(state, end, 1e-6)


def test_documents_packed_equal_documents_apart():
    lengths = (9, 1, 14, 7)
    arrays = draw(1, sum(lengths), 5, 3, seed=5, share_of_starts=0)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    arrays["starts"][0, begins] = True
    together, _ = scan(**arrays, chunk_tokens=8)
    for begin, end in zip(begins, ends, strict=True):
        span = slice(begin, end)
        by_token = {k: arrays[k][:, span] for k in ("x", "dt", "B", "C")}
        document = arrays | by_token | {"starts": None, "initial_state": None}
        apart, _ = scan(**document)
        near(together[:, span], apart, 1e-6)


@pytest.mark.parametrize(
    ("num_tokens", "chunk_tokens", "biased"),
    [(1, 8, True), (9, 8, False), (19, 5, True)],
)
def test_gradients_are_those_of_the_loop(num_tokens, chunk_tokens, biased):
    """Against central differences of the float64 loop, along random directions; of a
    loss that reads the state after the row as well."""
    arrays = draw(2, num_tokens, 4, 3, seed=6, biased=biased)
    starts = arrays.pop("starts")
    rng = np.random.default_rng(7)
    by_y = rng.standard_normal(arrays["x"].shape)
    by_state = rng.standard_normal(arrays["initial_state"].shape)

    def combine(y, state):
        return (by_y * y).sum() + (by_state * state).sum()

    def loss(arrays):
        return combine(*scan(**arrays, starts=starts, chunk_tokens=chunk_tokens))

    def true_loss(arrays):
        return combine(*reference(**arrays, starts=starts))

    gradients = jax.grad(loss)(arrays)
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        above, below = (
            true_loss(arrays | {name: arrays[name] + step * direction})
            for step in (1e-5, -1e-5)
        )
        scale = np.abs(gradient).max() * np.sqrt(gradient.size)
        slope = (above - below) / 2e-5
        assert np.sum(gradient * direction) == pytest.approx(slope, abs=1e-5 * scale)


def test_gradients_of_16_bits_have_the_arguments_types():
    arrays = draw(2, 9, 4, 3, seed=8)
    narrow = {k: jnp.asarray(arrays[k], jnp.bfloat16) for k in ("x", "B", "C")}
    mixed = {k: arrays[k] for k in FLOATS} | narrow
    true_y, _ = reference(**mixed, starts=arrays["starts"])

    def loss(mixed):
        y, _ = scan(**mixed, starts=arrays["starts"], chunk_tokens=4)
        return y.astype(jnp.float32).sum(), y

    gradients, y = jax.grad(loss, has_aux=True)(mixed)
    assert y.dtype == jnp.bfloat16
    near(y.astype(jnp.float32), true_y, 2**-8)
    assert all(gradients[name].dtype == mixed[name].dtype for name in FLOATS)


def test_memory_does_not_grow_by_a_state_a_token():
    """Forward and backward in chunks of 16, by the compiler's count: a token more is
    some numbers for each channel, not N."""
    channels, num_states = 64, 128

    def count_bytes(num_tokens):
        arrays = draw(1, num_tokens, channels, num_states, seed=9)
        starts = arrays.pop("starts")

        def loss(arrays):
            y, _ = selective_scan(**arrays, starts=starts, chunk_tokens=16)
            return jnp.sum(y * y)

        compiled = jax.jit(jax.grad(loss)).lower(arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state_bytes = channels * num_states * 4
    bytes_a_token = (count_bytes(512) - count_bytes(256)) / 256
    assert bytes_a_token < state_bytes / 4


@pytest.mark.heavy
@pytest.mark.parametrize(
    "has_starts", [pytest.param(False, marks=pytest.mark.more), True]
)
def test_runs_compose(has_starts):
    """Three runs summarized apart and composed, as devices do that share a sequence;
    the gradients through that too."""
    arrays = draw(2, 24, 4, 3, seed=10)
    starts = arrays.pop("starts") & has_starts
    spans = (slice(0, 8), slice(8, 17), slice(17, 24))

    def run_whole(arrays):
        return selective_scan(**arrays, starts=starts, chunk_tokens=5)

    def run_apart(arrays):
        def cut(span):
            by_token = {k: arrays[k][:, span] for k in ("x", "dt", "B", "C")}
            return arrays | by_token | {"starts": starts[:, span]}

        def summarize(run):
            names = ("x", "dt", "A", "B", "dt_bias", "starts")
            return summarize_scan(**{k: run[k] for k in names}, chunk_tokens=5)

        first, second, third = (cut(span) for span in spans)
        before = summarize(first)
        both = combine_scans(before, summarize(second))
        initial_state = arrays["initial_state"]
        states = (
            initial_state,
            before.advance(initial_state),
            both.advance(initial_state),
        )
        results = [
            selective_scan(**run | {"initial_state": state}, chunk_tokens=5)
            for run, state in zip((first, second, third), states, strict=True)
        ]
        return jnp.concatenate([y for y, _ in results], axis=1), results[-1][1]

    @partial(jax.jit, static_argnums=0)
    def gradients(run, arrays):
        def loss(arrays):
            y, state = run(arrays)
            return jnp.sum(y * jnp.cos(y)) + jnp.sum(state**2), (y, state)

        return jax.grad(loss, has_aux=True)(arrays)

    truth = gradients(run_whole, arrays)
    result = gradients(run_apart, arrays)
    jax.tree.map(partial(near, tolerance=2e-6), result, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": np.zeros((4, 3))}, r"x \(2, 6, 5\), A \(4, 3\)"),
        ({"B": np.zeros((2, 6, 5))}, r"B \(2, 6, 5\): want \(2, 6, 3\)"),
        ({"initial_state": np.zeros((2, 3, 5))}, r"want \(2, 5, 3\)"),
        ({"x": np.zeros((2, 0, 5))}, "at least one token"),
        ({"chunk_tokens": 0}, "chunk_tokens is at least 1; got 0"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scan(**draw(2, 6, 5, 3, seed=0) | change)
