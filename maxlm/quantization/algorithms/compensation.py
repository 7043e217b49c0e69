"""Rounding in turn, where what is still to be rounded makes up for the errors so far.

With H = mean of x xᵀ and the upper triangle U of H⁻¹ = Uᵀ U, a block b of columns is
rounded, its error e = (w_b - q_b) U[b, b]⁻¹ is spread as w[k] -= e · U[b, k] over the
columns k behind it, and the loss tr(ΔW H ΔWᵀ) is the sum of e². With blocks of one
column it is GPTQ's rule (arXiv 2210.17323, section 3), with blocks of eight QuIP#'s
block LDLQ (arXiv 2402.04396, section 4.1). Errors of a run of columns reach those
behind it by one product (lazy batch updates).

Matrices stand transposed here, [C, R]: what is rounded together is contiguous.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

RUN = 128
"""Columns between two products that spread errors over all that follow."""
MOST_DAMPING = 1e3

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class DampedHessian(NamedTuple):
    """H + damping · mean(diag(H)) · I, with ones for channels that no input reaches."""

    matrix: jax.Array
    """fp32 [C, C]"""
    factor: jax.Array
    """U, upper triangular [C, C]: the inverse is Uᵀ U."""


def damp_hessian(hessian: jax.Array, damping: float) -> DampedHessian:
    """Adds ``damping``, a part of the mean of diag(H), to diag(H) [C, C]. It is raised
    tenfold while there is no Cholesky factor in fp32.

    H = V Vᵀ with V upper is a Cholesky factor of H in reverse order, and U = V⁻¹: the
    inverse, whose factor would lose twice as many digits, is never made.
    """
    columns = hessian.shape[0]
    diagonal = jnp.diagonal(hessian)
    is_live = diagonal > 0
    mean = diagonal.sum() / jnp.maximum(is_live.sum(), 1)
    base = hessian + jnp.diag(jnp.where(is_live, 0.0, 1.0))
    identity = jnp.eye(columns, dtype=jnp.float32)

    def factor(damping: jax.Array) -> jax.Array:
        damped = base + damping * mean * identity
        return jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]

    def is_refused(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        damping, upper = state
        return jnp.isnan(upper).any() & (damping < MOST_DAMPING)

    def damp_more(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        damping = jnp.maximum(10 * state[0], 1e-6)
        return damping, factor(damping)

    first = jnp.float32(damping)
    used, upper = jax.lax.while_loop(is_refused, damp_more, (first, factor(first)))
    inverse = jax.scipy.linalg.solve_triangular(upper, identity, lower=False)
    return DampedHessian(base + used * mean * identity, inverse)


class RunRounder(Protocol):
    """Rounds a run of columns that compensate each other."""

    def __call__(
        self, values: jax.Array, factor: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Takes the run's values [L, R], U's block [L, L] and the run's number. Returns
        the values as they were when rounded, errors e [L, R], and arrays of the
        caller's, which are stacked."""
        ...


def round_in_runs(
    values: jax.Array, factor: jax.Array, run: int, round_run: RunRounder
) -> tuple[jax.Array, Any]:
    """Rounds values [C, R] in runs of ``run`` columns; zeros fill the last. Returns
    them as they were when rounded, [C, R], and the stacked arrays of ``round_run``."""
    columns, rows = values.shape
    padding = -columns % run
    values = jnp.pad(values, ((0, padding), (0, 0)))
    factor = jax.scipy.linalg.block_diag(factor, jnp.eye(padding))

    def take_run(
        errors: jax.Array, xs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        number, run_values = xs
        start = number * run
        above = jax.lax.dynamic_slice_in_dim(factor, start, run, axis=1)
        # Errors of later runs are still zero.
        spread = matmul(above.T, errors)
        inside = jax.lax.dynamic_slice_in_dim(above, start, run, axis=0)
        rounded, run_errors, extra = round_run(run_values - spread, inside, number)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, run_errors, start, axis=0)
        return errors, (rounded, extra)

    runs = values.reshape(-1, run, rows)
    numbers = jnp.arange(len(runs))
    errors = jnp.zeros_like(values)
    _, (rounded, extra) = jax.lax.scan(take_run, errors, (numbers, runs))
    return rounded.reshape(-1, rows)[:columns], extra


RoundBlock = Callable[[jax.Array, jax.Array], jax.Array]
"""Of a block's values [n, R] and its first column's place in the run: what they decode
to, [n, R]."""


def round_blocks(
    state: tuple[jax.Array, jax.Array],
    factor: jax.Array,
    starts: jax.Array,
    width: int,
    round_block: RoundBlock,
) -> tuple[jax.Array, jax.Array]:
    """Rounds blocks of a run in turn, which pass their errors on within the run.

    Args:
        state: values and errors of the run, [L, R] each.
        factor: U's block of the run, [L, L].
        starts: the blocks' first columns.
        width: the columns of a block.
    """
    places = jnp.arange(factor.shape[0])

    def take_block(
        step: jax.Array, state: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        values, errors = state
        start = starts[step]
        block = jax.lax.dynamic_slice_in_dim(values, start, width)
        rows = jax.lax.dynamic_slice_in_dim(factor, start, width)
        corner = jax.lax.dynamic_slice_in_dim(rows, start, width, axis=1)
        error = block - round_block(block, start)
        if width == 1:
            error = error / corner
        else:
            solve = jax.scipy.linalg.solve_triangular
            error = solve(corner, error, trans="T", lower=False)
        later = jnp.where(places >= start + width, rows, 0)
        if width == 1:
            values = values - later.T * error
        else:
            values = values - matmul(later.T, error)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, error, start, axis=0)
        return values, errors

    return jax.lax.fori_loop(0, len(starts), take_block, state)


def refine_rounding(
    weight: jax.Array,
    rounded: jax.Array,
    hessian: jax.Array,
    width: int,
    round_block: RoundBlock,
) -> jax.Array:
    """Rounds each block of ``width`` columns once more, given all others as they are
    now: one pass of coordinate descent on tr(ΔW H ΔWᵀ), which never raises it.

    The best value of block b is w_b + ΔW[not b] H[not b, b] H[b, b]⁻¹.

    Args:
        weight: what is rounded, [C, R].
        rounded: values [C, R] of which each block rounds to what it is now.
        hessian: H [C, C], with a positive diagonal.
        round_block: as in :func:`round_blocks`, with the place in the matrix.

    Returns:
        Values [C, R] of which each block rounds to what it should be.
    """
    columns = weight.shape[0]
    run = min(RUN, columns) // width * width
    padding = -columns % run
    weight = jnp.pad(weight, ((0, padding), (0, 0)))
    rounded = jnp.pad(rounded, ((0, padding), (0, 0)))
    hessian = jax.scipy.linalg.block_diag(hessian, jnp.eye(padding))
    blocks = weight.shape[0] // width

    def decode(number: jax.Array) -> jax.Array:
        start = number * width
        block = jax.lax.dynamic_slice_in_dim(rounded, start, width)
        return round_block(block, start)

    decoded = jax.lax.map(decode, jnp.arange(blocks)).reshape(weight.shape)

    def take_run(
        state: tuple[jax.Array, jax.Array], number: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        errors, rounded = state
        start = number * run
        beside = jax.lax.dynamic_slice_in_dim(hessian, start, run, axis=1)
        inside = jax.lax.dynamic_slice_in_dim(beside, start, run, axis=0)
        # ΔW H of the run's columns, kept up to date as they change.
        slopes = matmul(beside.T, errors)
        run_weight = jax.lax.dynamic_slice_in_dim(weight, start, run)

        def take_block(
            step: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            slopes, errors, rounded = state
            place = step * width
            get = partial(
                jax.lax.dynamic_slice_in_dim, start_index=place, slice_size=width
            )
            put = partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=0
            )
            error = get(errors)
            to_run = get(inside)
            corner = get(to_run, axis=1)
            # With this error the block would be at its best: slopes of zero.
            if width == 1:
                best = error - get(slopes) / corner
            else:
                best = error - jnp.linalg.solve(corner, get(slopes))
            value = get(run_weight) - best
            new_error = get(run_weight) - round_block(value, start + place)
            old_miss = error - best
            new_miss = new_error - best
            old_loss = (matmul(corner, old_miss) * old_miss).sum(0)
            new_loss = (matmul(corner, new_miss) * new_miss).sum(0)
            is_better = new_loss < old_loss
            change = jnp.where(is_better, new_error - error, 0)
            slopes = slopes + matmul(to_run.T, change)
            rounded = put(rounded, jnp.where(is_better, value, get(rounded)))
            return slopes, put(errors, error + change), rounded

        get_run = partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=run
        )
        run_state = (slopes, get_run(errors), get_run(rounded))
        run_state = jax.lax.fori_loop(0, run // width, take_block, run_state)
        put_run = partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0
        )
        return (put_run(errors, run_state[1]), put_run(rounded, run_state[2])), None

    state = (weight - decoded, rounded)
    runs = jnp.arange(weight.shape[0] // run)
    (_, rounded), _ = jax.lax.scan(take_run, state, runs)
    return rounded[:columns]
