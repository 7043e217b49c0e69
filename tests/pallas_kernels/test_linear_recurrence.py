"""Linear recurrences in chunks against their definition in float64, the gradients
against those of the sequential scan."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_recurrence import (
    apply_run,
    combine_runs,
    find_segment_starts,
    linear_recurrence,
    linear_recurrence_reference,
    linear_recurrence_step,
    params,
    summarize_run,
)
from pallas_kernels.linear_recurrence.params import RecurrenceOperands
from tests.pallas_kernels.recurrence_cases import (
    KINDS,
    SCALE,
    K,
    N,
    RecurrenceCase,
    V,
    define_recurrence,
    draw_case,
    draw_cotangents,
    near,
    run_with_gradients,
)

CHUNK = 32
more = pytest.mark.more
heavy = pytest.mark.heavy


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    """Blocks of two chunks, so that few tokens are several blocks."""
    monkeypatch.setattr(params, "BLOCK_TOKENS", 2 * CHUNK)


@partial(jax.jit, static_argnames="chunk_size")
def run_forward(case: RecurrenceCase, chunk_size=CHUNK):
    return linear_recurrence(
        *case.operands,
        initial_state=case.initial_state,
        starts=case.starts,
        scale=SCALE,
        chunk_size=chunk_size,
    )


@partial(jax.jit, static_argnames="function")
def run(case: RecurrenceCase, cotangents, function=linear_recurrence):
    """Output and final state, and gradients of all operands and of the initial state,
    in one program."""
    if function is linear_recurrence:
        function = partial(linear_recurrence, chunk_size=CHUNK)
    return run_with_gradients(function, case, cotangents)


LENGTHS = [
    pytest.param(1, marks=more),
    pytest.param(CHUNK - 1, marks=more),
    pytest.param(CHUNK, marks=more),
    pytest.param(CHUNK + 1, marks=more),
    4 * CHUNK + 5,
]


@heavy
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_the_definition(kind, tokens):
    case = draw_case(kind, tokens)
    cotangents = draw_cotangents(case)
    (output, state), gradients = run(case, cotangents)
    expected_output, expected_state = define_recurrence(case)
    near(output, expected_output, 1e-5)
    near(state, expected_state, 1e-5)
    _, reference = run(case, cotangents, linear_recurrence_reference)
    jax.tree.map(partial(near, tolerance=1e-4), gradients, reference)


@heavy
@pytest.mark.parametrize(
    "kind", ["gated delta", pytest.param("kimi delta", marks=more)]
)
@pytest.mark.parametrize(
    ("decay", "strongest"), [(0.01, 20.0), pytest.param(0.0, 0.0, marks=more)]
)
def test_no_decay_and_decays_of_twenty_a_token(kind, decay, strongest):
    """Cumulative sums over a chunk reach −400 beside tokens that hardly decay: their
    differences would be off by 3e-5, and exp() of their negatives overflows."""
    case = draw_case(kind, 3 * CHUNK, decay=decay, strongest=strongest)
    cotangents = draw_cotangents(case)
    (output, state), gradients = run(case, cotangents)
    expected_output, expected_state = define_recurrence(case)
    near(output, expected_output, 2e-6)
    near(state, expected_state, 2e-6)
    _, reference = run(case, cotangents, linear_recurrence_reference)
    jax.tree.map(partial(near, tolerance=1e-5), gradients, reference)


@heavy
def test_a_key_that_repeats_a_whole_chunk_long():
    """Powers of its matrix reach 1e18, its inverse has entries of 1 alone."""
    case = draw_case("gated delta", 64, decay=0.0)
    k = np.broadcast_to(case.operands.k[:, :1], case.operands.k.shape)
    ones = np.ones_like(case.operands.beta)
    operands = case.operands._replace(k=k, beta=ones)
    case = case._replace(operands=operands, starts=np.zeros_like(case.starts))
    output, state = run_forward(case, chunk_size=64)
    expected_output, expected_state = define_recurrence(case)
    near(output, expected_output, 1e-5)
    near(state, expected_state, 1e-5)


@heavy
@pytest.mark.parametrize(
    "kind", ["kimi delta", *(pytest.param(x, marks=more) for x in list(KINDS)[:3])]
)
def test_packed_documents_equal_separate_ones_whatever_stands_in_others(kind):
    """Forward and backward; the documents begin within chunks, and at one."""
    # Those that are compared are of one length: one program computes both.
    lengths = (CHUNK + 8, 12, CHUNK - 20, 40)
    case = draw_case(kind, sum(lengths), rows=1)
    ids = np.repeat(np.arange(len(lengths)), lengths)[None]
    starts = np.asarray(find_segment_starts(ids))
    case = case._replace(starts=starts)
    big = jax.tree.map(np.copy, case.operands)
    big.v[:, : lengths[0]] *= 1e15
    big.v[:, -lengths[-1] :] *= 1e15
    d_output, d_state = draw_cotangents(case)
    d_state = np.zeros_like(d_state)
    packed = case._replace(operands=big)
    (packed_output, _), pulled = run(packed, (d_output, d_state))
    packed_gradients, d_initial = pulled
    ends = np.cumsum(lengths)
    for first, end in pairwise(ends[:3]):
        span = slice(first, end)
        operands = jax.tree.map(lambda x, span=span: x[:, span], case.operands)
        zero = np.zeros_like(case.initial_state)
        document = RecurrenceCase(operands, zero, np.zeros_like(starts[:, span]))
        (output, _), (gradients, _) = run(document, (d_output[:, span], d_state))
        near(packed_output[:, span], output, 1e-6)
        parts = jax.tree.map(lambda x, span=span: x[:, span], packed_gradients)
        # The first token's decay meets a state of zero: no gradient in either.
        jax.tree.map(partial(near, tolerance=1e-6), parts, gradients)
    assert np.abs(d_initial).max() > 0


@heavy
@pytest.mark.parametrize(
    "kind", ["kimi delta", *(pytest.param(x, marks=more) for x in list(KINDS)[:3])]
)
def test_decoding_equals_chunks_and_padding_leaves_the_state(kind):
    """Row 0 has padding before its tokens, row 1 behind them."""
    tokens = 9
    case = draw_case(kind, tokens)
    mask = np.ones((2, tokens), bool)
    mask[0, :3] = mask[1, -2:] = False
    starts = case.starts & False
    starts[0, 5] = True

    @jax.jit
    def decode(state, operands, starts, mask):
        def step(state, inputs):
            token, start, is_token = inputs
            output, state = linear_recurrence_step(
                *token, state=state, scale=SCALE, starts=start, token_mask=is_token
            )
            return state, output

        inputs = (operands, starts, mask)
        inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
        state, outputs = jax.lax.scan(step, state, inputs)
        return jnp.moveaxis(outputs, 0, 1), state

    recur = jax.jit(partial(linear_recurrence, scale=SCALE, chunk_size=8))
    masks = {"starts": starts, "token_mask": mask}
    output, state = recur(*case.operands, initial_state=case.initial_state, **masks)
    decoded, decoded_state = decode(case.initial_state, case.operands, starts, mask)
    near(decoded_state, state, 1e-6)
    near(np.where(mask[..., None, None], decoded - output, 0), 0.0, 1e-6)
    for row, span in ((0, slice(3, tokens)), (1, slice(0, tokens - 2))):
        cut = jax.tree.map(lambda x, r=row, s=span: x[r : r + 1, s], case.operands)
        alone = RecurrenceCase(
            cut, case.initial_state[row : row + 1], starts[row : row + 1, span]
        )
        expected_output, expected_state = define_recurrence(alone)
        near(output[row : row + 1, span], expected_output, 1e-5)
        near(state[row : row + 1], expected_state, 1e-5)


@heavy
@pytest.mark.parametrize(
    "kind", ["kimi delta", *(pytest.param(x, marks=more) for x in list(KINDS)[:3])]
)
def test_runs_of_tokens_combine_to_the_whole(kind):
    """States and gradients, in both groupings; a document starts in the second run."""
    lengths = (17, 40, 13)
    case = draw_case(kind, sum(lengths), decay=0.02)
    starts = np.zeros_like(case.starts)
    starts[1, 30] = True
    case = case._replace(starts=starts)
    ends = np.cumsum(lengths)
    spans = [
        slice(end - length, end) for end, length in zip(ends, lengths, strict=True)
    ]

    def summarize(operands: RecurrenceOperands):
        return [
            summarize_run(
                *jax.tree.map(lambda x, span=span: x[:, span], operands)[1:],
                starts=starts[:, span],
                chunk_size=16,
            )
            for span in spans
        ]

    def combine(operands, state):
        first, second, third = summarize(operands)
        left = combine_runs(combine_runs(first, second), third)
        right = combine_runs(first, combine_runs(second, third))
        others = (apply_run(right, state), second.transition)
        return apply_run(left, state), others

    @jax.jit
    def combine_with_gradients(operands, state, d_state):
        left, pull, others = jax.vjp(combine, operands, state, has_aux=True)
        return left, others, pull(d_state)

    zero = np.zeros_like(case.operands.v)
    _, d_state = draw_cotangents(case)
    left, (right, transition), pulled = combine_with_gradients(
        case.operands, case.initial_state, d_state
    )
    _, expected = define_recurrence(case)
    near(left, expected, 1e-5)
    near(right, expected, 1e-5)
    assert np.all(transition[1] == 0)
    assert np.all(np.abs(transition[0]).reshape(N, -1).max(-1) > 0)
    _, expected = run(case, (zero, d_state), linear_recurrence_reference)
    jax.tree.map(partial(near, tolerance=1e-4), pulled, expected)


@heavy
def test_operands_of_16_bits_have_a_state_of_32():
    case = draw_case("kimi delta", 70)
    q, k, v, log_decay, beta = case.operands
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    operands = RecurrenceOperands(*narrow, log_decay, beta)
    case = case._replace(operands=operands)
    d_output, d_state = draw_cotangents(case)
    cotangents = (d_output.astype(jnp.bfloat16), d_state)
    (output, state), (gradients, _) = run(case, cotangents)
    assert (output.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    expected_output, expected_state = define_recurrence(case)
    near(output, expected_output, 2.0**-8)
    near(state, expected_state, 1e-5)
    dtypes = [x.dtype for x in gradients]
    assert dtypes == [jnp.bfloat16] * 3 + [jnp.float32] * 2


def test_what_waits_for_the_backward_pass_is_the_operands_and_a_state_a_block():
    tokens = 4 * CHUNK + 5
    case = draw_case("kimi delta", tokens)

    def linearize(operands, state):
        changed = case._replace(operands=operands, initial_state=state)
        return jax.vjp(lambda x: run_forward(changed._replace(operands=x)), operands)[1]

    residuals = jax.eval_shape(linearize, case.operands, case.initial_state)
    elements = sum(x.size for x in jax.tree.leaves(residuals))
    operands = sum(x.size for x in case.operands)
    blocks = 3
    masks = 2 * case.operands.k.size + 2 * case.operands.log_decay.size
    assert elements <= operands + blocks * case.initial_state.size + masks
    assert elements < tokens * N * K * V


def test_starts_are_where_the_document_changes():
    ids = np.array([[3, 3, 5, 5, 3], [0, 1, 1, 1, 2]])
    inside = [[0, 0, 1, 0, 1], [0, 1, 0, 0, 1]]
    np.testing.assert_array_equal(find_segment_starts(ids), np.array(inside, bool))
    after = find_segment_starts(ids, np.array([3, 7]))
    assert after[:, 0].tolist() == [False, True]


OPERANDS = draw_case("gated delta", 4).operands
BAD = {
    "want q and k": (OPERANDS._replace(q=OPERANDS.q[:, :3]), {}),
    "N a multiple": (OPERANDS._replace(v=OPERANDS.v[:, :, :5]), {}),
    "want log_decay": (OPERANDS._replace(log_decay=OPERANDS.k), {}),
    "want beta": (OPERANDS._replace(beta=OPERANDS.v), {}),
    "want a power": (OPERANDS, {"chunk_size": 24}),
    "want \\[B, N, K, V\\]": (OPERANDS, {"initial_state": np.zeros((2, N, V, K))}),
    "want bool": (OPERANDS, {"starts": np.zeros((2, 5), bool)}),
    "known are": (OPERANDS, {"backend": "abacus"}),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_belong_together_is_said(message):
    operands, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        linear_recurrence(*operands, **options)
