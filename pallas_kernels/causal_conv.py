"""Depthwise causal convolution over short windows of packed documents, in plain XLA:
the one in front of Mamba's scan (Gu & Dao 2023, arXiv 2312.00752, §3.4), of delta-rule
layers, and of LFM2's short convolutions.

A training step, a prompt in chunks, a decoding step of one token, and a device's run of
a sequence that is split over devices all go through :func:`causal_conv`: what a run
needs of the tokens before it is their last W − 1 inputs, the state.

Shapes: B batch, T tokens, C channels, W width of the window.
"""

from functools import partial
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

__all__ = ["causal_conv", "update_conv_state"]

ConvActivation = Literal["silu"]


def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    starts: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    live: jax.Array | None = None,
    activation: ConvActivation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes ``y[t] = act(Σ_lag weight[W − 1 − lag] · x[t − lag] + bias)`` for each
    channel by itself, over lags 0 to W − 1 within the token's document.

    Sums are fp32. Differentiable in x, weight, bias and initial_state, in reverse mode;
    the backward pass keeps x alone and forms the sum before the activation anew.

    Args:
        x: [B, T, C].
        weight: [C, W], the current token's last, as ``torch.nn.Conv1d`` stores it
            ([C, 1, W]).
        bias: [C].
        starts: bool [B, T], whether a document begins with the token: it and later ones
            see nothing before it. None: no token does.
        initial_state: [B, W − 1, C], inputs of the W − 1 tokens before the first, zeros
            where the document was shorter. None: zeros.
        live: bool [B, T]; tokens that are not live come last in a row and are not part
            of the state after it. None: all are.
        activation: "silu", applied to the sum in fp32.

    Returns:
        y [B, T, C] in x's dtype (of tokens that are not live: anything), and the state
        after the last live token, [B, W − 1, C] in x's dtype.

    Raises:
        ValueError: shapes that do not belong together, or an unknown activation.
    """
    _check(x, weight, bias, starts, initial_state, live)
    if activation not in (None, "silu"):
        raise ValueError(f"activation is 'silu' or None; got {activation!r}")
    # A type checker does not see through the decorator of _convolve.
    y = cast(jax.Array, _convolve(x, weight, bias, initial_state, starts, activation))
    state = update_conv_state(x, weight.shape[1], starts, initial_state, live)
    return y, state


def update_conv_state(
    x: jax.Array,
    width: int,
    starts: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    live: jax.Array | None = None,
) -> jax.Array:
    """Returns the state after a run of tokens alone: what the run's last document, in
    it and before it, had as its last ``width`` − 1 inputs, zeros where it is shorter.

    A run of at least W − 1 tokens needs no ``initial_state`` for this. So devices that
    hold successive runs of a sequence exchange these, once, before any of them
    convolves.

    Args: as for :func:`causal_conv`.

    Returns:
        [B, W − 1, C] in x's dtype.
    """
    num_tokens = x.shape[1]
    slots = width - 1
    inputs = _extend(x, slots, initial_state)
    # Token t is input t + W − 1: the last W − 1 of n live tokens begin at input n.
    if live is None:
        state = inputs[:, num_tokens:]
    else:
        last_inputs = jnp.sum(live, axis=1, dtype=jnp.int32)[:, None]
        last_inputs = last_inputs + jnp.arange(slots, dtype=jnp.int32)
        state = jnp.take_along_axis(inputs, last_inputs[:, :, None], axis=1)
    if starts is None:
        return state

    input_starts = jnp.pad(starts, ((0, 0), (slots, 0)))
    if live is None:
        input_starts = input_starts[:, num_tokens:]
    else:
        input_starts = jnp.take_along_axis(input_starts, last_inputs, axis=1)
    # A slot is of the last document if none begins behind it.
    later_starts = jnp.cumsum(input_starts[:, ::-1].astype(jnp.int32), axis=1)[:, ::-1]
    later_starts -= input_starts
    return jnp.where(later_starts[:, :, None] == 0, state, 0)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolve(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    initial_state: jax.Array | None,
    starts: jax.Array | None,
    activation: ConvActivation | None,
) -> jax.Array:
    """Returns y of :func:`causal_conv`."""
    y = _sum_window(x, weight, bias, initial_state, starts)
    if activation is not None:
        y = jax.nn.silu(y)
    return y.astype(x.dtype)


class _Residuals(NamedTuple):
    x: jax.Array
    weight: jax.Array
    bias: jax.Array | None
    initial_state: jax.Array | None
    starts: jax.Array | None


def _forward(x, weight, bias, initial_state, starts, activation):
    y = _convolve(x, weight, bias, initial_state, starts, activation)
    return y, _Residuals(x, weight, bias, initial_state, starts)


def _backward(
    activation: ConvActivation | None, residuals: _Residuals, d_y: jax.Array
) -> tuple[jax.Array | None, ...]:
    x, weight, bias, initial_state, starts = residuals
    num_tokens = x.shape[1]
    width = weight.shape[1]
    dtype = _sum_dtype(x.dtype)
    d_sum = d_y.astype(dtype)
    if activation is not None:
        window_sum = _sum_window(x, weight, bias, initial_state, starts)
        # Of s·σ(s): σ(s) · (1 + s · (1 − σ(s))).
        sigmoid = jax.nn.sigmoid(window_sum)
        d_sum = d_sum * sigmoid * (1 + window_sum * (1 - sigmoid))

    inputs = _extend(x, width - 1, initial_state)
    weights = weight.astype(dtype)
    masks = _mask_lags(starts, width)
    d_inputs = jnp.zeros(inputs.shape, dtype)
    d_weights = []
    for column in range(width):
        lag = width - 1 - column
        mask = masks[lag]
        d_column = d_sum
        if mask is not None:
            d_column = jnp.where(mask[:, :, None], d_sum, 0)
        # Input `column` + t is read by token t.
        shift = ((0, 0), (column, lag), (0, 0))
        d_inputs = d_inputs + jnp.pad(d_column * weights[:, column], shift)
        column_inputs = inputs[:, column : column + num_tokens].astype(dtype)
        d_weights.append(jnp.sum(d_column * column_inputs, axis=(0, 1)))

    d_x = d_inputs[:, width - 1 :].astype(x.dtype)
    d_weight = jnp.stack(d_weights, axis=1).astype(weight.dtype)
    d_bias = None
    if bias is not None:
        d_bias = jnp.sum(d_sum, axis=(0, 1)).astype(bias.dtype)
    d_state = None
    if initial_state is not None:
        d_state = d_inputs[:, : width - 1].astype(initial_state.dtype)
    return d_x, d_weight, d_bias, d_state, None


_convolve.defvjp(_forward, _backward)


def _sum_window(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    initial_state: jax.Array | None,
    starts: jax.Array | None,
) -> jax.Array:
    """Returns the weighted sums of each token's window, [B, T, C], in fp32."""
    num_tokens = x.shape[1]
    width = weight.shape[1]
    dtype = _sum_dtype(x.dtype)
    inputs = _extend(x, width - 1, initial_state)
    weights = weight.astype(dtype)
    masks = _mask_lags(starts, width)
    total = jnp.zeros(x.shape, dtype)
    for column in range(width):
        terms = inputs[:, column : column + num_tokens].astype(dtype)
        mask = masks[width - 1 - column]
        if mask is not None:
            terms = jnp.where(mask[:, :, None], terms, 0)
        total = total + terms * weights[:, column]
    return total if bias is None else total + bias.astype(dtype)


def _extend(x: jax.Array, slots: int, initial_state: jax.Array | None) -> jax.Array:
    """Returns x [B, slots + T, C] with the inputs before it."""
    if initial_state is None:
        return jnp.pad(x, ((0, 0), (slots, 0), (0, 0)))
    return jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)


def _mask_lags(starts: jax.Array | None, width: int) -> list[jax.Array | None]:
    """Returns, for each lag, which tokens have the input so far back in their document,
    bool [B, T]; None: all have."""
    if starts is None:
        return [None] * width
    num_tokens = starts.shape[1]
    masks: list[jax.Array | None] = [None]
    is_inside = jnp.ones_like(starts)
    for lag in range(1, width):
        # Token t − lag is of another document if one begins with t − lag + 1 or later.
        shifted = jnp.pad(starts, ((0, 0), (lag - 1, 0)))[:, :num_tokens]
        is_inside = is_inside & ~shifted
        masks.append(is_inside)
    return masks


def _sum_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of sums: fp32, or that of wider numbers."""
    return jnp.promote_types(dtype, jnp.float32)


def _check(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    starts: jax.Array | None,
    initial_state: jax.Array | None,
    live: jax.Array | None,
) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"x is [B, T, C] and weight [C, W]; got x {x.shape}, weight {weight.shape}"
        )
    num_rows, num_tokens, channels = x.shape
    width = weight.shape[1]
    if num_tokens == 0 or width == 0:
        raise ValueError(
            f"no size may be 0; got x {x.shape}, weight {weight.shape} [C, W]"
        )
    expected = {
        "bias": (bias, (channels,)),
        "starts": (starts, (num_rows, num_tokens)),
        "initial_state": (initial_state, (num_rows, width - 1, channels)),
        "live": (live, (num_rows, num_tokens)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} {array.shape}: want {shape} for x {x.shape}, "
                f"weight {weight.shape}"
            )
