"""GPTQ: rounds a matrix a column at a time, and the columns to come make up for the error
(Frantar et al. 2022, arXiv 2210.17323).

Columns may be taken in the order of falling diag(H), so that the inputs of most weight
are rounded while there are still columns to make up for them. No order here needs an
index of groups in the file:

- ``"none"``: as they stand.
- ``"static"``: over the whole row; scales are chosen beforehand, from the matrix itself.
- ``"groups"``: groups by their largest diag(H), and within a group each column, so that
  a group stays together and its scales are chosen when it is reached.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.quantization.algorithms.compensation import (
    RUN,
    damp_hessian,
    refine_rounding,
    round_blocks,
    round_in_runs,
)
from maxlm.quantization.algorithms.hessian import compute_proxy_loss
from maxlm.quantization.algorithms.rounding import (
    CLIP_RATIOS,
    ScaledFormat,
    Scales,
    add_block_dim,
    get_block,
    round_values,
    search_scales,
    split_blocks,
)
from maxlm.quantization.formats.format import Planes

ActOrder = Literal["none", "static", "groups"]


@dataclass(frozen=True)
class GptqConfig:
    """Settings of :func:`quantize_gptq`."""

    damping: float = 0.01
    """Added to diag(H), as a part of its mean; raised tenfold while H has no Cholesky
    factor in fp32."""
    act_order: ActOrder = "groups"
    scales: Literal["compensated", "original"] = "compensated"
    """What a group's scales are chosen from: its columns with the errors of those
    before, when it is reached; or the matrix itself, which ``"static"`` always uses."""
    clip_ratios: tuple[float, ...] = CLIP_RATIOS
    """Parts of a block's range that the search of its scales tries; ``(1.0,)``: its
    whole range, without a search."""
    refine_passes: int = 0
    """Passes that round each column once more, given all others. Each takes as long as
    GPTQ itself, and lowers the loss."""


class GptqResult(NamedTuple):
    """A matrix that GPTQ rounded."""

    planes: Planes
    values: jax.Array
    """fp32 [R, C]: what the planes decode to."""
    loss: jax.Array
    """fp32: tr(ΔW H ΔWᵀ), without damping."""


@partial(jax.jit, static_argnames=("rounding", "config"))
def quantize_gptq(
    weight: jax.Array,
    hessian: jax.Array,
    rounding: ScaledFormat,
    config: GptqConfig = GptqConfig(),
) -> GptqResult:
    """Rounds an fp32 matrix [R, C] whose inputs have the mean of x xᵀ [C, C].

    A column that no input reaches (diag(H) = 0) becomes what zero rounds to.
    """
    columns = weight.shape[1]
    block = get_block(rounding, columns)
    is_dead = jnp.diagonal(hessian) == 0
    values = jnp.where(is_dead, 0, weight.astype(jnp.float32)).T
    order = order_columns(jnp.diagonal(hessian), block, config.act_order)
    damped = damp_hessian(hessian[order][:, order], config.damping)
    values = values[order]
    compensates = config.scales == "compensated" and block < columns
    if compensates and config.act_order != "static":
        rounded, scales = _round_groups(values, damped.factor, rounding, config, block)
        by_column = jax.tree.map(lambda part: jnp.repeat(part, block, 0), scales)
        groups = jnp.argsort(order[::block] // block)
        scales = jax.tree.map(lambda part: part[groups].T, scales)
    else:
        # What an error of a column costs when later columns have made up for it.
        importance = jnp.zeros(columns).at[order].set(jnp.diagonal(damped.factor) ** -2)
        places = jnp.argsort(order)
        blocks = split_blocks(values[places].T, block)
        weights = importance.reshape(-1, block)
        scales = search_scales(blocks, rounding, weights, config.clip_ratios)
        by_column = jax.tree.map(lambda part: part.T[order // block], scales)
        rounded = _round_columns(values, damped.factor, by_column, rounding)
    if config.refine_passes:
        padded = jax.tree.map(lambda part: _pad_columns(part, RUN), by_column)

        def round_column(value: jax.Array, place: jax.Array) -> jax.Array:
            return round_values(value, _get_row(padded, place), rounding)

        def refine(_: int, rounded: jax.Array) -> jax.Array:
            return refine_rounding(values, rounded, damped.matrix, 1, round_column)

        rounded = jax.lax.fori_loop(0, config.refine_passes, refine, rounded)
    blocks = split_blocks(rounded[jnp.argsort(order)].T, block)
    codes = rounding.round_to_codes(blocks, *add_block_dim(scales))
    decoded = rounding.decode_codes(codes, *add_block_dim(scales))
    decoded = decoded.reshape(weight.shape)
    loss = compute_proxy_loss(weight - decoded, hessian)
    planes = rounding.pack(codes.reshape(weight.shape), *scales)
    return GptqResult(planes, decoded, loss)


def order_columns(diagonal: jax.Array, block: int, act_order: ActOrder) -> jax.Array:
    """Returns int32 [C]: the columns in the order in which they are rounded, given
    diag(H) [C] and how many share a scale."""
    columns = diagonal.shape[0]
    if act_order == "none":
        return jnp.arange(columns)
    if act_order == "static":
        return jnp.argsort(-diagonal)
    by_group = diagonal.reshape(-1, block)
    groups = jnp.argsort(-by_group.max(-1))
    within = jnp.argsort(-by_group, axis=-1)
    return (groups[:, None] * block + within[groups]).reshape(-1)


def _round_groups(
    values: jax.Array,
    factor: jax.Array,
    rounding: ScaledFormat,
    config: GptqConfig,
    block: int,
) -> tuple[jax.Array, Scales]:
    """Returns values [C, R] as they were when rounded and scales [C / block, R], each
    group's chosen when it is reached."""
    columns, rows = values.shape
    groups_per_run = max(1, min(RUN, columns) // block)

    def round_run(
        run: jax.Array, factor: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, jax.Array, Scales]:
        del number
        # What an error of a column costs, when its turn comes.
        importance = jnp.diagonal(factor) ** -2

        def take_group(
            state: tuple[jax.Array, jax.Array], group: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], Scales]:
            start = group * block
            group_values = jax.lax.dynamic_slice_in_dim(state[0], start, block)
            weights = jax.lax.dynamic_slice_in_dim(importance, start, block)
            scales = search_scales(
                group_values.T, rounding, weights, config.clip_ratios
            )

            def round_column(value: jax.Array, place: jax.Array) -> jax.Array:
                del place
                return round_values(value, scales, rounding)

            starts = start + jnp.arange(block)
            return round_blocks(state, factor, starts, 1, round_column), scales

        state = (run, jnp.zeros_like(run))
        state, scales = jax.lax.scan(take_group, state, jnp.arange(groups_per_run))
        return *state, scales

    run = groups_per_run * block
    rounded, scales = round_in_runs(values, factor, run, round_run)
    # [runs, groups of a run, R], with groups of zeros at the end.
    groups = columns // block
    scales = jax.tree.map(lambda part: part.reshape(-1, rows)[:groups], scales)
    return rounded, scales


def _round_columns(
    values: jax.Array, factor: jax.Array, scales: Scales, rounding: ScaledFormat
) -> jax.Array:
    """Returns values [C, R] as they were when rounded with their scales [C, R]."""
    run = min(RUN, values.shape[0])
    padded = jax.tree.map(lambda part: _pad_columns(part, run), scales)

    def round_run(
        values: jax.Array, factor: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, jax.Array, None]:
        def round_column(value: jax.Array, place: jax.Array) -> jax.Array:
            return round_values(value, _get_row(padded, number * run + place), rounding)

        state = (values, jnp.zeros_like(values))
        state = round_blocks(state, factor, jnp.arange(run), 1, round_column)
        return *state, None

    rounded, _ = round_in_runs(values, factor, run, round_run)
    return rounded


def _pad_columns(values: jax.Array, run: int) -> jax.Array:
    """Returns [C, R] with the last row repeated up to a multiple of ``run``."""
    return jnp.pad(values, ((0, -len(values) % run), (0, 0)), mode="edge")


def _get_row(scales: Scales, place: jax.Array) -> Scales:
    """Returns one row of scales [C, R] as [1, R]."""
    return jax.tree.map(lambda part: part[place][None], scales)
