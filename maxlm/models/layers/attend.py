"""What all kinds of attention have in common: their inputs, and the way from queries,
keys and values to an output.

Shapes: B batch, S queries, T keys, D model, N query heads, K kv heads, H head dim, Hv
value dim; R is the largest distance with a learnt bias.
"""

from dataclasses import replace
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.models.build_context import BuildContext
from maxlm.models.caches import RaggedBatch
from maxlm.models.caches.paged import AttentionCache
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention_config import AttentionConfig, TemperatureConfig
from maxlm.models.layers.linear import Linear
from maxlm.models.layers.rope import Rotary
from maxlm.models.params import declare, materialize
from maxlm.models.remat import save_inputs_only
from maxlm.parallel.attention import sharded_attention
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.terms import AttentionTerms, limit_window
from maxlm.sharding import AxisRules


class KeysValues(NamedTuple):
    """Keys [B, T, K, H] and values [B, T, K, Hv] of one layer."""

    key: jax.Array
    value: jax.Array


class EncoderOutput(NamedTuple):
    """An encoder's output, for the layers of a decoder."""

    states: jax.Array
    """[B, T, D]."""
    segment_ids: jax.Array | None
    """int [B, T]; None: each row is one segment."""


class ProjectionTerms(NamedTuple):
    """Terms that are added to a layer's queries, keys and values as they are projected,
    before norms and positions; None: nothing is."""

    query: jax.Array | None = None
    """[B, S, N, H]."""
    key: jax.Array | None = None
    """[B, S, K, H]."""
    value: jax.Array | None = None
    """[B, S, K, Hv]."""


class AttentionInputs(NamedTuple):
    """Inputs of a layer beside its hidden states: of its mixer, and what experts read of
    each token."""

    positions: jax.Array
    """int [B, S]."""
    segment_ids: jax.Array | None
    """int [B, S], 0 for padding; None: all one segment."""
    rotary: Rotary | None
    """Angles of the positions; None: queries and keys are not turned."""
    slopes: jax.Array | None
    """fp32 [N], of ALiBi: slope · distance is taken from a score."""
    biases: jax.Array | None
    """fp32 [N, 2R + 1], learnt, for key − query from −R to R; added to scores."""
    scale: float
    """Factor on q·k."""
    window: int | None
    """Tokens that a token sees, itself included; None: all before it."""
    causal: bool
    batch: RaggedBatch | None = None
    """With a cache: the sequences that the tokens continue."""
    shared: KeysValues | None = None
    """Without a cache: what the layer reads whose config has ``shares_keys``; see
    :meth:`~maxlm.models.layers.attention.Attention.__call__`."""
    shared_block: nnx.Module | None = None
    """Module of weights that the layer reads and others read too, bound; see
    :class:`~maxlm.models.blocks.ReadsSharedBlock`."""
    embeddings: jax.Array | None = None
    """[B, S, D]: what has entered the first layer; for layers with a shared block."""
    routes: jax.Array | None = None
    """int [B, S, k]: experts of the layer's tokens, in place of those that its router
    would choose; -1: it chooses. None: it does for all."""
    record_routes: bool = False
    """Whether a layer with experts returns those that it has chosen."""


class AttentionLayer(Protocol):
    """What :func:`attend` reads of a layer."""

    config: AttentionConfig
    rules: AxisRules
    parallel: ParallelConfig
    sinks: nnx.Param | None
    out: Linear


def declare_sinks(config: AttentionConfig) -> nnx.Param | None:
    """Declares a layer's sinks [N], where it has any."""
    if not config.sinks:
        return None
    zeros = jax.nn.initializers.zeros
    return declare((config.num_heads,), ("heads",), zeros, "vector")


def read_sinks(layer: AttentionLayer) -> jax.Array | None:
    """Returns a layer's sinks [N] in fp32 or wider, split as heads are; None: it has
    none."""
    if layer.sinks is None:
        return None
    return materialize(layer.sinks, layer.rules, accumulation_dtype(layer.out.dtype))


def attend(
    layer: AttentionLayer,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    inputs: AttentionInputs,
    cache: AttentionCache | None,
    rules: AxisRules,
    *,
    value_dim: int | None = None,
) -> tuple[jax.Array, AttentionCache | None]:
    """Attends to these tokens and a cache's, if there is one.

    Args:
        q: [B, S, N, H].
        k, v: [B, S, K, H] and [B, S, K, Hv]; no value, with a cache: it is the
            beginning of the key; neither: the cache has those of these tokens.
        rules: layout of q, k and v, where their kv heads need not lie as the layer's
            own rules say: the one kv head of a cache of latent vectors is not split.
        value_dim: Hv, where there is no value.

    Returns:
        [B, S, N, Hv], and the cache with these tokens in it.
    """
    window = inputs.window
    chunk = layer.config.chunk
    if inputs.causal:
        # No key of its chunk is farther away: tiles beyond are skipped, and pages given
        # back.
        window = limit_window(window, chunk)
    terms = AttentionTerms(
        window=window,
        chunk=chunk,
        scale=inputs.scale,
        soft_cap=layer.config.soft_cap,
        slopes=inputs.slopes,
        biases=inputs.biases,
        sinks=read_sinks(layer),
    )
    if cache is not None:
        assert inputs.batch is not None
        return cache.attend(
            q, k, v, inputs.batch, terms, rules=rules, value_dim=value_dim
        )
    assert k is not None
    assert v is not None
    segments = inputs.segment_ids
    if chunk is not None:
        segments = split_segments_by_chunk(segments, inputs.positions, chunk)
        terms = replace(terms, chunk=None)
    y = sharded_attention(
        q,
        k,
        v,
        terms,
        rules=rules,
        causal=inputs.causal,
        segment_ids=None if segments is None else (segments, segments),
        method=layer.parallel.context,
        balanced=layer.parallel.balance_sequence,
        batch_invariant=layer.parallel.batch_invariant,
    )
    return y, None


def build_output_gate(
    config: AttentionConfig, context: BuildContext, input_dim: int | None = None
) -> Linear | None:
    """Builds the map to a layer's output gate, [D, N, Hv] or [D, N], where it has one.
    ``input_dim``: in place of D."""
    if config.output_gate is None:
        return None
    outputs = {"heads": config.num_heads}
    if config.output_gate == "element":
        outputs["head_dim"] = config.value_dim
    input_features = {"embed": input_dim or context.d_model}
    return Linear(input_features, outputs, context, bias=False)


def apply_output_gate(y: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Multiplies attention's output y [B, S, N, Hv] by the sigmoid, in fp32, of gate [B,
    S, N, Hv] or [B, S, N]; None: returns y (Qiu et al. 2025, eq. 5)."""
    if gate is None:
        return y

    def multiply(y: jax.Array, gate: jax.Array) -> jax.Array:
        wide = accumulation_dtype(y.dtype)
        if gate.ndim < y.ndim:
            gate = gate[..., None]
        return (y.astype(wide) * jax.nn.sigmoid(gate.astype(wide))).astype(y.dtype)

    return save_inputs_only(multiply)(y, gate)


def scale_by_position(
    q: jax.Array, positions: jax.Array, temperature: TemperatureConfig | None
) -> jax.Array:
    """Multiplies queries [B, S, N, H] at positions int [B, S] by their
    :class:`TemperatureConfig`; None: returns them."""
    if temperature is None:
        return q
    steps = (positions + temperature.offset) // temperature.length
    wide = accumulation_dtype(q.dtype)
    factor = 1 + temperature.scale * jnp.log1p(steps.astype(wide))
    return (q.astype(wide) * factor[..., None, None]).astype(q.dtype)


def split_segments_by_chunk(
    segment_ids: jax.Array | None, positions: jax.Array, chunk: int
) -> jax.Array:
    """Returns ids, int32 [B, S], of the chunks of ``chunk`` positions that segments
    consist of; 0 for padding, as in ``segment_ids``. A segment's positions follow one
    another."""
    if segment_ids is None:
        segment_ids = jnp.ones_like(positions)
    # A row has at most so many chunks of one segment, the first and the last in part.
    most_chunks = positions.shape[-1] // chunk + 2
    index = positions // chunk % most_chunks
    ids = 1 + (segment_ids - 1) * most_chunks + index
    return jnp.where(segment_ids == 0, 0, ids).astype(jnp.int32)
