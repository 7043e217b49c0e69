"""How layers are joined into blocks, and blocks into a scanned stack."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import reshard

from maxlm.models.aux import Aux
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attention import Attention, AttentionConfig, AttentionInputs, KVCache
from maxlm.models.layers.latent_attention import LatentAttention
from maxlm.models.layers.mlp import Mlp, MlpConfig
from maxlm.models.layers.moe import Moe, MoeAux, MoeConfig
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.params import Params, bind, cast_matrices, get_values, param_specs
from maxlm.models.remat import RematPolicy, apply_remat
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.layers import join_periods, scan_layers, split_periods, stack_layers, take_layer
from maxlm.parallel.local import LANES, axis_size, get_layout, make_spec
from maxlm.sharding import AxisRules


class EncoderOutput(NamedTuple):
    """What an encoder made of the input, for the layers of a decoder."""

    states: jax.Array | KVCache
    """[B, T, D]; or, for inference, a layer's keys and values of it [B, T, K, H]."""
    segment_ids: jax.Array | None
    """int [B, T]; None: each row is one segment."""

    def segments_with(self, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array] | None:
        """Segments of queries and keys, for a decoder's tokens."""
        if self.segment_ids is None:
            return None
        own = jnp.ones_like(inputs.positions) if inputs.segment_ids is None else inputs.segment_ids
        return own, self.segment_ids


Placement = Literal["pre", "post", "sandwich", "parallel", "parallel_shared"]


class BlockConfig(NamedTuple):
    """What every layer of a stack is built of."""

    attention: AttentionConfig
    mlp: MlpConfig | MoeConfig
    norm: NormConfig
    placement: Placement
    d_model: int
    depth: int
    """Layers of the whole model, for the initial size of what they add."""
    init_std: float
    cross_attention: bool = False
    """Whether layers look at an encoder's output as well."""


class Block(nnx.Module):
    """Attention and an MLP (or a mixture of experts), each added to the residual stream.

    ==================  ====================================================
    placement           a branch f, with its own norms
    ==================  ====================================================
    pre                 x + f(norm(x))
    post                norm(x + f(x))
    sandwich            x + norm(f(norm(x)))
    parallel            x + attention(norm(x)) + mlp(norm(x))
    parallel_shared     the same, with one norm for both
    ==================  ====================================================
    """

    def __init__(
        self, config: BlockConfig, *, rules: AxisRules, dtype: Any, parallel: ParallelConfig
    ):
        self.placement = config.placement
        kw: dict[str, Any] = {"rules": rules, "dtype": dtype}
        sizes = (config.d_model, config.depth, config.init_std)
        norm = partial(Norm, config.norm, config.d_model, **kw)
        sandwich = config.placement == "sandwich"
        kind = Attention if config.attention.latent is None else LatentAttention
        layers = (config.attention, config.norm, *sizes)
        self.attention_norm = norm()
        self.attention = kind(*layers, parallel=parallel, **kw)
        self.attention_post_norm = norm() if sandwich else None
        crossing = config.cross_attention
        self.cross_norm = norm() if crossing else None
        self.cross = Attention(*layers, parallel=parallel, **kw) if crossing else None
        self.mlp_norm = norm() if config.placement != "parallel_shared" else None
        mlp = config.mlp
        self.mlp = Mlp(mlp, *sizes, **kw) if isinstance(mlp, MlpConfig) else None
        self.moe = Moe(mlp, *sizes, **kw) if isinstance(mlp, MoeConfig) else None
        self.mlp_post_norm = norm() if sandwich else None

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: KVCache | None = None,
        memory: EncoderOutput | None = None,
    ) -> tuple[jax.Array, KVCache | None, Aux]:
        """x [B, S, D] → the same, the layer's cache with these tokens in it, and what the layer
        adds to the loss and the log."""
        if self.placement in ("parallel", "parallel_shared"):
            y = self.attention_norm(x)
            z = y if self.mlp_norm is None else self.mlp_norm(x)
            y, cache = self.attention(y, inputs, cache)
            z, aux = self._feed(z, inputs)
            return x + y + z, cache, aux
        y, cache = self.attention(self._before(self.attention_norm, x), inputs, cache)
        x = self._joined(x, y, self.attention_norm, self.attention_post_norm)
        if memory is not None and self.cross is not None:
            y = self._before(self.cross_norm, x)
            y = self.cross.cross_attend(
                y, self.project_keys_values(memory), memory.segments_with(inputs)
            )
            x = self._joined(x, y, self.cross_norm, None)
        y, aux = self._feed(self._before(self.mlp_norm, x), inputs)
        return self._joined(x, y, self.mlp_norm, self.mlp_post_norm), cache, aux

    def project_keys_values(self, memory: EncoderOutput) -> KVCache:
        """What cross-attention looks up of an encoder's output."""
        if isinstance(memory.states, KVCache):
            return memory.states
        assert self.cross is not None
        return self.cross.project_keys_values(memory.states)

    def _before(self, norm: Norm | None, x: jax.Array) -> jax.Array:
        return x if norm is None or self.placement == "post" else norm(x)

    def _joined(
        self, x: jax.Array, y: jax.Array, norm: Norm | None, after: Norm | None
    ) -> jax.Array:
        if self.placement == "post":
            assert norm is not None
            return norm(x + y)
        return x + (y if after is None else after(y))

    def _feed(self, x: jax.Array, inputs: AttentionInputs) -> tuple[jax.Array, Aux]:
        if self.moe is None:
            assert self.mlp is not None
            return self.mlp(x), Aux()
        counted = None
        if inputs.segment_ids is not None:
            counted = reshard(inputs.segment_ids != 0, make_spec(get_layout(x)[:2]))
        y, routed = self.moe(x, counted)
        return y, Aux(routed.loss, sum_expert_loads(routed))


def sum_expert_loads(routed: MoeAux) -> dict[str, jax.Array]:
    """Assignments to the mean, the busiest and the idlest expert, and those dropped by one."""
    load = routed.load
    return {
        "expert_load": load.mean(),
        "expert_load_max": load.max(),
        "expert_load_min": load.min(),
        "expert_dropped": routed.dropped / load.size,
    }


Body = Callable[[Any, Any, Any, Any], tuple[Any, Aux]]
"""``(block, x, context, shared) -> (x, aux)`` for one layer."""


def scan_blocks(
    block: nnx.Module,
    params: Params,
    bodies: Sequence[Body],
    x: Any,
    context: Any,
    shared: Any = None,
    *,
    dtype: Any,
    remat: RematPolicy = "none",
) -> tuple[Any, Aux]:
    """Run a stacked block layer after layer; compile time does not grow with depth.

    Args:
        block: the stacked block; only its structure is used.
        params: its parameters, with a leading layer axis (``params.stack``).
        bodies: what layers do with it, by turns.
        context: arrays that every layer reads.
        shared: the same, with a gradient.
        dtype: of matrices in use, and of their gradients until all layers are through.

    Returns:
        x after all layers, and their ``Aux`` added up.
    """

    def layer(body, own, carry, context, shared):
        x, total = carry
        x, aux = body(bind(block, own), x, context, shared)
        return x, jax.tree.map(jnp.add, total, aux)

    specs = param_specs(block)

    def cast(own: Params) -> Params:
        return cast_matrices(specs, own, partial(round_to_dtype, dtype=dtype), ("matrix",))

    first = jax.tree.map(lambda a: a[0], params)
    _, aux = jax.eval_shape(lambda own: bodies[0](bind(block, own), x, context, shared), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, accumulation_dtype(s.dtype)), aux)
    alone = len(bodies) == 1 and len(jax.tree.leaves(params)[0]) > 1
    layers = [apply_remat(partial(layer, body), remat, alone=alone) for body in bodies]
    return scan_layers(layers, params, (x, zeros), context, shared=shared, cast=cast)


def round_to_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    """``x.astype(dtype)``, of one layer at a time: left alone, XLA:TPU casts the parameters of all
    layers before the loop, and turns their dimensions around, and holds these copies throughout."""
    if x.dtype == dtype:
        return x
    to = jnp.finfo(dtype)
    x = lax.reduce_precision(x, to.nexp, to.nmant).astype(dtype)
    if x.shape[-1] // axis_size(get_layout(x)[-1]) < LANES:
        return x  # a TPU keeps so narrow a shard turned around to begin with
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def scan_cached(
    stacked: nnx.Module, bodies: Sequence[Callable[..., tuple[Any, Any]]], carry: Any, held: Any
) -> tuple[Any, Any]:
    """The same for inference: bodies ``(block, carry, held) -> (carry, cache)``, without gradient;
    the block is bound, and what layers hold and the caches they write are stacked by layer."""
    count = len(bodies)

    def period(carry, inputs):
        kept = []
        for place, body in enumerate(bodies):
            own, layers = take_layer(inputs, place, count)
            carry, cache = body(bind(stacked, own), carry, layers)
            kept.append(cache)
        return carry, stack_layers(kept)

    carry, cache = lax.scan(period, carry, split_periods((get_values(stacked), held), count))
    return carry, join_periods(cache, count)
