"""How layers are joined into blocks, and blocks into a scanned stack."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import reshard

from maxlm.models.aux import Aux
from maxlm.models.layers.attention import Attention, AttentionConfig, KVCache
from maxlm.models.layers.mlp import Mlp, MlpConfig
from maxlm.models.layers.moe import Moe, MoeAux, MoeConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.positions import Rotary
from maxlm.models.params import Params, ParamSpec, bind, param_specs, values
from maxlm.models.remat import RematPolicy, rematerialise
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.layers import scan_layers
from maxlm.parallel.local import LANES, axis_size, layout, spec_of
from maxlm.sharding import AxisRules

BlockT = TypeVar("BlockT", bound=nnx.Module)


class Block(nnx.Module):
    """Pre-norm residual block: ``x += attention(norm(x)); x += mlp(norm(x))``, or a mixture of
    experts in the MLP's place."""

    def __init__(
        self,
        attention: AttentionConfig,
        mlp: MlpConfig | MoeConfig,
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
        sizes = (d_model, num_layers, init_std)
        self.attention_norm = Norm(norm, d_model, **kw)
        self.attention = Attention(attention, *sizes, parallel=parallel, **kw)
        self.mlp_norm = Norm(norm, d_model, **kw)
        dense = isinstance(mlp, MlpConfig)
        self.mlp = Mlp(mlp, *sizes, **kw) if dense else None
        self.moe = Moe(mlp, *sizes, **kw) if not dense else None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        rotary: Rotary | None,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None, Aux]:
        """x [B, S, D] → the same, the layer's cache with these tokens in it, and what the layer
        adds to the loss and the log."""
        y, cache = self.attention(self.attention_norm(x), positions, segment_ids, rotary, cache)
        x = x + y
        y = self.mlp_norm(x)
        if self.moe is None:
            assert self.mlp is not None
            return x + self.mlp(y), cache, Aux()
        counted = None
        if segment_ids is not None:
            counted = reshard(segment_ids != 0, spec_of(layout(x)[:2]))
        y, routed = self.moe(y, counted)
        return x + y, cache, Aux(routed.loss, expert_sums(routed))


def expert_sums(routed: MoeAux) -> dict[str, jax.Array]:
    """Assignments to the mean, the busiest and the idlest expert, and those dropped by one."""
    load = routed.load
    return {
        "expert_load": load.mean(),
        "expert_load_max": load.max(),
        "expert_load_min": load.min(),
        "expert_dropped": routed.dropped / load.size,
    }


def scan_blocks(
    block: BlockT,
    params: Params,
    body: Callable[[BlockT, Any, Any], tuple[Any, Aux]],
    x: Any,
    context: Any,
    *,
    dtype: Any,
    remat: RematPolicy = "none",
) -> tuple[Any, Aux]:
    """Run a stacked block layer after layer; compile time does not grow with depth.

    Args:
        block: the stacked block; only its structure is used.
        params: its parameters, with a leading layer axis (``params.stack``).
        body: ``(block, x, context) -> (x, aux)`` for one layer.
        context: arrays that every layer reads.
        dtype: of matrices in use, and of their gradients until all layers are through.

    Returns:
        x after all layers, and their ``Aux`` added up.
    """

    def layer(own, carry, context):
        x, total = carry
        x, aux = body(bind(block, own), x, context)
        return x, jax.tree.map(jnp.add, total, aux)

    specs = param_specs(block)

    def cast(own: Params) -> Params:
        def one(spec: ParamSpec, held: Any) -> Any:  # an array, or a Whole
            return (
                jax.tree.map(partial(rounded, dtype=dtype), held) if spec.role == "matrix" else held
            )

        return jax.tree.map(one, specs, own)

    first = jax.tree.map(lambda a: a[0], params)
    _, aux = jax.eval_shape(lambda own: body(bind(block, own), x, context), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(jnp.shape(s), jnp.float32), aux)
    return scan_layers(rematerialise(layer, remat), params, (x, zeros), context, cast=cast)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """``x.astype(dtype)``, of one layer at a time: left alone, XLA:TPU casts the parameters of all
    layers before the loop, and turns their dimensions around, and holds these copies throughout."""
    if x.dtype == dtype:
        return x
    to = jnp.finfo(dtype)
    x = lax.reduce_precision(x, to.nexp, to.nmant).astype(dtype)
    if x.shape[-1] // axis_size(layout(x)[-1]) < LANES:
        return x  # a TPU keeps so narrow a shard turned around to begin with
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def scan_cached(
    stacked: BlockT, body: Callable[[BlockT, Any, Any], tuple[Any, Any]], carry: Any, cache: Any
) -> tuple[Any, Any]:
    """The same for inference: ``(block, carry, layer's cache) -> (carry, cache)``, without
    gradient; the block is bound and the cache stacked by layer."""

    def layer(carry, inputs):
        own, cache = inputs
        return body(bind(stacked, own), carry, cache)

    return lax.scan(layer, carry, (values(stacked), cache))
