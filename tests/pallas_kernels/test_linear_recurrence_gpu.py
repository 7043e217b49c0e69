"""The GPU kernels of linear recurrences, in the interpreter, equal the definition in
float64, and their gradients the sequential scan's."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.linear_recurrence import (
    linear_recurrence,
    linear_recurrence_reference,
    params,
    triton,
    xla,
)
from pallas_kernels.linear_recurrence.params import RecurrenceCall, RecurrenceOperands
from tests.pallas_kernels.recurrence_cases import (
    KINDS,
    RecurrenceCase,
    define_recurrence,
    draw_case,
    draw_cotangents,
    near,
    run_with_gradients,
)

CHUNK = 16
pytestmark = pytest.mark.heavy
more = pytest.mark.more


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    """Blocks of four chunks: the tests have two of them."""
    monkeypatch.setattr(params, "BLOCK_TOKENS", 4 * CHUNK)


@partial(jax.jit, static_argnums=2)
def run(case: RecurrenceCase, cotangents, is_kernel: bool):
    """Output, final state, and gradients, by the kernels or by the definition."""
    function = linear_recurrence_reference
    if is_kernel:
        function = partial(
            linear_recurrence, chunk_size=CHUNK, backend="triton", interpret=True
        )
    return run_with_gradients(function, case, cotangents)


@pytest.mark.parametrize(
    "kind",
    [
        "gated delta",
        *(pytest.param(x, marks=more) for x in KINDS if x != "gated delta"),
    ],
)
def test_they_equal_the_definition(kind):
    """Two blocks of unlike chunks, the last one ragged; sizes that are no power of
    two."""
    case = draw_case(kind, 6 * CHUNK + 5, rows=1, strongest=20.0)
    cotangents = draw_cotangents(case)
    results, gradients = run(case, cotangents, True)
    expected = define_recurrence(case)
    jax.tree.map(partial(near, tolerance=2e-6), results, expected)
    _, expected_gradients = run(case, cotangents, False)
    jax.tree.map(partial(near, tolerance=1e-5), gradients, expected_gradients)


@more
@pytest.mark.parametrize("kind", ["gated delta", "kimi delta"])
def test_operands_of_16_bits_lose_what_their_rounding_does(kind):
    """Products with states and inverses are three of bf16: 2⁻¹⁶ off, and not 2⁻⁹."""
    case = draw_case(kind, 3 * CHUNK + 1, rows=1)
    q, k, v, *others = case.operands
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    case = case._replace(operands=RecurrenceOperands(*narrow, *others))
    d_output, d_state = draw_cotangents(case)
    cotangents = (d_output.astype(jnp.bfloat16), d_state)
    (output, state), gradients = run(case, cotangents, True)
    expected_output, expected_state = define_recurrence(case)
    near(output, expected_output, 2.0**-8)
    near(state, expected_state, 2.0**-14)
    _, expected = run(case, cotangents, False)
    jax.tree.map(partial(near, tolerance=2.0**-7), gradients, expected)


@more
def test_states_alone_are_those_of_xla_in_several_parts():
    """As a run's summary wants them: no queries; 36 columns, which two programs have."""
    case = draw_case("gated delta", 5 * CHUNK, rows=1)
    v = jnp.concatenate([case.operands.v] * 3, axis=3)
    state = jnp.concatenate([case.initial_state] * 3, axis=3)
    operands = case.operands._replace(q=None, v=v)
    operands = params.mark_tokens(operands, jnp.asarray(case.starts), None)
    call = RecurrenceCall(1.0, CHUNK, "triton", interpret=True)
    results = []
    for module in (triton, xla):
        output, last, block_states = jax.jit(module.forward, static_argnums=2)(
            operands, state, call
        )
        assert output is None
        pulled = jax.jit(module.backward, static_argnums=4)(
            operands, block_states, None, state, call
        )
        results.append((last, block_states, pulled))
    jax.tree.map(partial(near, tolerance=1e-5), *results)
