"""A short causal convolution of each channel by itself, as mixers of channels run it:
whole rows in training, the tokens of a step from a cache in inference.

Shapes: B batch, S sequence, F channels, W width of the convolution. In inference B is
the shards D of the batch, and S the tokens of a step.
"""

import jax

from maxlm.models.caches import RecurrentCache, SplitArray
from maxlm.models.layers.attend import AttentionInputs
from maxlm.parallel.causal_conv import sharded_causal_conv
from maxlm.sharding import AxisRules
from pallas_kernels.causal_conv import ConvActivation, causal_conv

# Channels are split as an MLP's hidden units are: nothing mixes them.
_CHANNEL_AXES = ("mlp",)


def convolve_channels(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    inputs: AttentionInputs,
    *,
    rules: AxisRules,
    balanced: bool,
    activation: ConvActivation | None = None,
) -> jax.Array:
    """Convolves whole rows, anew from the start of each document.

    Args:
        x: [B, S, F], split over the axes of ``mlp``.
        weight: [F, W]; its last column is the token's own.
        bias: [F], or None.
        balanced: whether rows are in the balanced order of
            ``context.sequence_order_indices``.

    Returns:
        Like x.

    Raises:
        MaxlmError: a sequence that does not divide over its devices.
    """
    return sharded_causal_conv(
        SplitArray(x, _CHANNEL_AXES),
        weight,
        bias,
        rules=rules,
        segment_ids=inputs.segment_ids,
        balanced=balanced,
        activation=activation,
    )


def convolve_channels_cached(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    inputs: AttentionInputs,
    cache: RecurrentCache,
    *,
    rules: AxisRules,
    activation: ConvActivation | None = None,
) -> tuple[jax.Array, RecurrentCache]:
    """Convolves the tokens of a step of inference, each behind those that the cache
    keeps of its sequence.

    Args:
        x: [D, S, F].
        weight, bias: see :func:`convolve_channels`.
        cache: the last inputs of every row, [D, rows, W − 1, F].

    Returns:
        An array like x, and the cache after these tokens.
    """

    def advance(
        state: jax.Array,
        tokens: tuple[jax.Array],
        live: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        (x,) = tokens
        y, state = causal_conv(
            x, weight, bias, initial_state=state, live=live, activation=activation
        )
        return state, y

    assert inputs.batch is not None
    params = [SplitArray(weight, (*_CHANNEL_AXES, None))]
    if bias is not None:
        params.append(SplitArray(bias, _CHANNEL_AXES))
    return cache.run(
        advance,
        [SplitArray(x, _CHANNEL_AXES)],
        inputs.batch,
        rules,
        params=params,
        output_axes=_CHANNEL_AXES,
    )
