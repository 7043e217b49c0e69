"""How layers are joined into blocks, and blocks into a scanned stack."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import lax

from maxlm.models.layers.attention import Attention, AttentionConfig, KVCache
from maxlm.models.layers.mlp import Mlp, MlpConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.positions import Rotary
from maxlm.models.params import Params, bind, values
from maxlm.models.remat import RematPolicy, rematerialise
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.layers import scan_layers
from maxlm.sharding import AxisRules

BlockT = TypeVar("BlockT", bound=nnx.Module)


class Block(nnx.Module):
    """Pre-norm residual block: ``x += attention(norm(x)); x += mlp(norm(x))``."""

    def __init__(
        self,
        attention: AttentionConfig,
        mlp: MlpConfig,
        norm: NormConfig,
        d_model: int,
        num_layers: int,
        init_std: float,
        *,
        rules: AxisRules,
        dtype: Any,
        parallel: ParallelConfig,
    ):
        kw: dict[str, Any] = {"rules": rules, "dtype": dtype}
        self.attention_norm = Norm(norm, d_model, **kw)
        self.attention = Attention(
            attention, d_model, num_layers, init_std, parallel=parallel, **kw
        )
        self.mlp_norm = Norm(norm, d_model, **kw)
        self.mlp = Mlp(mlp, d_model, num_layers, init_std, **kw)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        rotary: Rotary | None,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B, S, D] → the same, and the layer's cache with these tokens in it."""
        y, cache = self.attention(self.attention_norm(x), positions, segment_ids, rotary, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


def scan_blocks(
    block: BlockT,
    params: Params,
    body: Callable[[BlockT, Any, Any], Any],
    carry: Any,
    context: Any,
    *,
    remat: RematPolicy = "none",
) -> Any:
    """Run a stacked block layer after layer; compile time does not grow with depth.

    Args:
        block: the stacked block; only its structure is used.
        params: its parameters, with a leading layer axis (``params.stack``).
        body: ``(block, carry, context) -> carry`` for one layer.
        context: arrays that every layer reads.
    """

    def layer(own, carry, context):
        return body(bind(block, own), carry, context)

    return scan_layers(rematerialise(layer, remat), params, carry, context)


def scan_cached(
    stacked: BlockT, body: Callable[[BlockT, Any, Any], tuple[Any, Any]], carry: Any, cache: Any
) -> tuple[Any, Any]:
    """The same for inference: ``(block, carry, layer's cache) -> (carry, cache)``, without
    gradient; the block is bound and the cache stacked by layer."""

    def layer(carry, inputs):
        own, cache = inputs
        return body(bind(stacked, own), carry, cache)

    return lax.scan(layer, carry, (values(stacked), cache))
