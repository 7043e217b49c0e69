"""The TPU kernels of linear recurrences, in the interpreter, equal the definition in
float64, and their gradients the sequential scan's."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_recurrence import (
    linear_recurrence,
    linear_recurrence_reference,
    params,
    tpu,
    xla,
)
from pallas_kernels.linear_recurrence.params import RecurrenceCall, RecurrenceOperands
from tests.pallas_kernels.recurrence_cases import (
    KINDS,
    SCALE,
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
# Memory that nobody wrote holds NaN, and reads past the end of an array are errors.
POISONED = pltpu.InterpretParams(
    uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@pytest.fixture(autouse=True)
def _blocks_of_four_chunks(monkeypatch):
    """Blocks of four chunks: a forward pass has one group in them, the backward two."""
    monkeypatch.setattr(params, "BLOCK_TOKENS", 4 * CHUNK)


@pytest.fixture
def short_blocks(_blocks_of_four_chunks, monkeypatch):
    """Blocks of two chunks, whose programs compile in half the time."""
    monkeypatch.setattr(params, "BLOCK_TOKENS", 2 * CHUNK)


@partial(jax.jit, static_argnums=2)
def run(case: RecurrenceCase, cotangents, is_kernel: bool):
    """Output, final state, and gradients, by the kernels or by the definition."""
    function = linear_recurrence_reference
    if is_kernel:
        function = partial(
            linear_recurrence, chunk_size=CHUNK, backend="tpu", interpret=POISONED
        )
    return run_with_gradients(function, case, cotangents)


@pytest.mark.parametrize(
    "kind",
    ["kimi delta", *(pytest.param(x, marks=more) for x in list(KINDS)[:3])],
)
@pytest.mark.parametrize(
    "tokens",
    [6 * CHUNK + 5, pytest.param(1, marks=more), pytest.param(CHUNK, marks=more)],
)
def test_they_equal_the_definition(kind, tokens):
    case = draw_case(kind, tokens, rows=1, strongest=20.0)
    if tokens == 1:
        # One token is no chunk of the kernel's: XLA takes it.
        call = RecurrenceCall(SCALE, CHUNK, "tpu")
        assert not tpu.supports(case.operands, call)
        return
    cotangents = draw_cotangents(case)
    results, gradients = run(case, cotangents, True)
    expected = define_recurrence(case)
    jax.tree.map(partial(near, tolerance=2e-6), results, expected)
    _, expected_gradients = run(case, cotangents, False)
    jax.tree.map(partial(near, tolerance=1e-5), gradients, expected_gradients)


@pytest.mark.parametrize(
    "kind", ["gated delta", pytest.param("kimi delta", marks=more)]
)
def test_operands_of_16_bits_lose_what_their_rounding_does(kind, short_blocks):
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


def test_states_alone_are_those_of_xla(short_blocks):
    """As a run's summary wants them: no queries; values wider than keys."""
    case = draw_case("gated delta", 5 * CHUNK, rows=1)
    operands = case.operands._replace(q=None)
    operands = params.mark_tokens(operands, case.starts, None)
    call = RecurrenceCall(1.0, CHUNK, "tpu", interpret=POISONED)
    results = []
    for module in (tpu, xla):
        output, state, block_states = jax.jit(module.forward, static_argnums=2)(
            operands, case.initial_state, call
        )
        assert output is None
        pulled = jax.jit(module.backward, static_argnums=4)(
            operands, block_states, None, case.initial_state, call
        )
        results.append((state, block_states, pulled))
    jax.tree.map(partial(near, tolerance=1e-5), *results)
