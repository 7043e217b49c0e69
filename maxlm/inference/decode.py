"""Prefill and decode: the model with a cache, as two pure functions to jit.

Call them on the mesh that the parameters lie on: ``bind_mesh(mesh, jax.jit(prefill, ...))``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.architectures.transformer import Cache, CrossAttentionCache, Transformer
from maxlm.models.caches import CacheArraySpec
from maxlm.models.params import Params, bind, cast_params_by_role, param_specs
from maxlm.sharding import resolve_placement


def cast_params(model: Transformer, params: Params) -> Params:
    """Casts matrices and tables to the compute dtype, once and not at every token; no copy where
    they are in it already. Norm scales stay fp32, as the norms compute with them."""
    roles = "matrix", "table"
    return cast_params_by_role(param_specs(model), params, lambda x: x.astype(model.dtype), roles)


def init_cache(model: Transformer, batch: int, length: int) -> Cache:
    """Returns empty caches of ``length`` tokens a row, in their compute layout on the current mesh;
    pure, also under jit.

    Raises:
        MaxlmError: rows or kv heads that do not divide over their mesh axes.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)

    def allocate(layers: int, array: CacheArraySpec) -> jax.Array:
        shape, axes = (layers, *array.shape), ("layers", *array.axes)
        spec = resolve_placement("cache", shape, axes, model.rules, sizes).spec
        return jnp.zeros(shape, array.dtype or model.dtype, out_sharding=spec)

    return {
        name: jax.tree.map(partial(allocate, layers), own)
        for name, (layers, own) in model.cache_specs(batch, length).items()
    }


def encode(
    model: Transformer, params: Params, tokens: jax.Array, lengths: jax.Array
) -> CrossAttentionCache | None:
    """Returns the cross-attention cache of whole prompts, arguments as of :func:`prefill`; None:
    there is no encoder."""
    if not isinstance(model, EncoderDecoder):
        return None
    positions, rows = _places(model, tokens.shape), model.rules.spec("batch", None)
    segments = (positions < reshard(lengths, model.rules.spec("batch"))[:, None]).astype(jnp.int32)
    # Padding at 0, as in training: a row is as long as its last position says (dynamic NTK).
    inputs = reshard(tokens, rows), positions * segments, segments
    return bind(model, params).init_cross_cache(inputs)


def prefill(
    model: Transformer,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    cache_length: int,
    cross_cache: CrossAttentionCache | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs whole prompts, padded on the right, through the model.

    Args:
        tokens: int [B, S].
        lengths: int [B], tokens of each row that are not padding, ≥ 1.
        cache_length: slots T ≥ S to allocate for each row.
        cross_cache: what :func:`encode` made of the input, where there is an encoder.

    Returns:
        fp32 logits [B, V] after each row's own last token, and the cache.
    """
    rules, rows = model.rules, model.rules.spec("batch", None)
    cache = init_cache(model, tokens.shape[0], cache_length)
    bound, positions = bind(model, params), _places(model, tokens.shape)
    tokens, lengths = reshard(tokens, rows), reshard(lengths, rules.spec("batch"))
    hidden, cache = bound.forward_with_cache(tokens, positions, cache, cross_cache, lengths)
    hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return bound.logits(hidden)[:, 0], cache


def decode(
    model: Transformer,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    cross_cache: CrossAttentionCache | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs one token a row.

    Args:
        tokens: int [B].
        positions: int [B]; a token at a position past the cache's last slot is not written.
        cache: everything before them; donate it, or two of it are alive at once.

    Returns:
        fp32 logits [B, V] after these tokens, and the cache with them in it.
    """
    rows = model.rules.spec("batch", None)
    bound = bind(model, params)
    tokens, positions = (reshard(a[:, None], rows) for a in (tokens, positions))
    hidden, cache = bound.forward_with_cache(tokens, positions, cache, cross_cache)
    return bound.logits(hidden)[:, 0], cache


def _places(model: Transformer, shape: tuple[int, ...]) -> jax.Array:
    """int32 [B, S]: 0, 1, ... in every row."""
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return reshard(positions, model.rules.spec("batch", None))
