"""Prefill and decode: the model with a cache, as two pure functions to jit.

Call them on the mesh that the parameters lie on: ``on_mesh(mesh, jax.jit(prefill, ...))``.
"""

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from maxlm.inference.cache import init_cache
from maxlm.models.architectures.transformer import Transformer
from maxlm.models.layers.attention import Cache
from maxlm.models.params import Params, bind, param_specs


def cast_params(model: Transformer, params: Params) -> Params:
    """Matrices and tables in the compute dtype, once rather than at every token; no copy where
    they are in it already. Norm scales stay fp32, as the norms compute with them."""
    return jax.tree.map(
        lambda spec, value: value if spec.role == "vector" else value.astype(model.dtype),
        param_specs(model),
        params,
    )


def prefill(
    model: Transformer, params: Params, tokens: jax.Array, lengths: jax.Array, cache_length: int
) -> tuple[jax.Array, Cache]:
    """Run whole prompts, padded on the right, through the model.

    Padding needs no mask: it lies after every real token, which causal attention cannot see, and
    decoding writes each new token over the padding in its slot before anything reads that slot.

    Args:
        tokens: int [B, S].
        lengths: int [B], tokens of each row that are not padding, ≥ 1.
        cache_length: slots T ≥ S to allocate for each row.

    Returns:
        fp32 logits [B, V] after each row's own last token, and the cache.
    """
    rules, (batch, width) = model.rules, tokens.shape
    rows = rules.spec("batch", None)
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    cache = init_cache(model.config, batch, cache_length, model.dtype, rules)
    bound = bind(model, params)
    hidden, cache = bound.cached(reshard(tokens, rows), reshard(positions, rows), cache)
    last = reshard(lengths - 1, rules.spec("batch"))
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return bound.logits(hidden)[:, 0], cache


def decode(
    model: Transformer, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """One token a row.

    Args:
        tokens: int [B].
        positions: int [B], where each stands in its row; a position past the cache's last slot
            is not written.
        cache: everything before them; donate it, or two of it are alive at once.

    Returns:
        fp32 logits [B, V] after these tokens, and the cache with them in it.
    """
    rows = model.rules.spec("batch", None)
    bound = bind(model, params)
    tokens, positions = (reshard(a[:, None], rows) for a in (tokens, positions))
    hidden, cache = bound.cached(tokens, positions, cache)
    return bound.logits(hidden)[:, 0], cache
