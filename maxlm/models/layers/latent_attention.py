"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.models.caches import CacheLayout, kv_cache_spec
from maxlm.models.costs import AttentionCosts, LayerCosts, MatrixGroup
from maxlm.models.layers.attention import (
    AttentionConfig,
    AttentionInputs,
    attention_kwargs,
    self_attention_kwargs,
)
from maxlm.models.layers.linear import Linear, compute_residual_std, project
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.rope import rotate
from maxlm.models.params import materialize
from maxlm.parallel.attention import sharded_attention
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules


class LatentAttention(nnx.Module):
    """Keys and values of every head from one vector a token: eq. 9–19.

    Parameters: ``query`` [D or q_rank, N, H], with q_rank behind ``query_down`` and ``query_norm``;
    ``key_down`` [D, kv_rank] with ``key_norm``; ``key_rotary`` [D, R], shared by all heads;
    ``key_up`` [kv_rank, N, H − R] and ``value_up`` [kv_rank, N, Hv]; ``out`` [N, Hv, D].
    """

    name = "attention"

    def __init__(
        self,
        config: AttentionConfig,
        norm: NormConfig,
        d_model: int,
        num_layers: int,
        init_std: float,
        *,
        rules: AxisRules,
        dtype: Any,
        parallel: ParallelConfig,
    ):
        assert config.latent is not None
        self.config, self.latent, self.parallel = config, config.latent, parallel
        # Every query head has its own keys and values, where it is.
        self.rules = rules.model_copy(update={"kv_heads": rules.heads})
        # The vector is whole wherever heads are.
        self.shared_rules = rules.model_copy(update={"kv_heads": ()})
        latent, outer = config.latent, {"embed": d_model}
        own: dict[str, Any] = {"rules": rules, "dtype": dtype}
        kw: dict[str, Any] = {"bias": False, "std": init_std, **own}
        down: dict[str, Any] = {**kw, "bias": config.bias}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        rank = latent.q_rank
        self.query_down = Linear(outer, {"latent": rank}, **down) if rank else None
        self.query_norm = Norm(norm, rank, **own) if rank else None
        self.query = Linear({"embed": rank} if rank else outer, heads, **kw)
        # Maps out of the vector are stored split as those out of the residual stream are.
        vector = {"embed": latent.kv_rank}
        self.key_down = Linear(outer, {"latent": latent.kv_rank}, **down)
        self.key_norm = Norm(norm, latent.kv_rank, **own)
        self.key_rotary = Linear(outer, {"head_dim": latent.rotary_dim}, **down)
        plain = {"heads": config.num_heads, "head_dim": config.head_dim - latent.rotary_dim}
        values = {"heads": config.num_heads, "head_dim": latent.value_dim}
        self.key_up = Linear(vector, plain, **kw)
        self.value_up = Linear(vector, values, **kw)
        std = compute_residual_std(init_std, num_layers)
        self.out = Linear(values, outer, **{**kw, "bias": config.has_out_bias, "std": std})

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """See :class:`~maxlm.models.layers.attention.Attention`."""
        assert inputs.rotary is not None
        first = self.query if self.query_down is None else self.query_down
        q, vector, shared = project(x, first, self.key_down, self.key_rotary)
        if self.query_norm is not None:
            q = self.query(self.query_norm(q))
        plain = self.config.head_dim - self.latent.rotary_dim
        q, turned = q[..., :plain], rotate(q[..., plain:], inputs.rotary)
        vector, shared = self.key_norm(vector), rotate(shared[:, :, None], inputs.rotary)
        if cache is None:
            scores = attention_kwargs(self.config, inputs, self.rules)
            k, v = project(vector, self.key_up, self.value_up)
            of_all = (*k.shape[:3], shared.shape[-1])
            shared = jnp.broadcast_to(shared, of_all, out_sharding=jax.typeof(k).sharding)
            k = jnp.concatenate([k, shared], axis=-1)
            q = jnp.concatenate([q, turned], axis=-1)
            q, k, v = (checkpoint_name(a, "qkv") for a in (q, k, v))
            own = self_attention_kwargs(inputs, self.parallel)
            y = sharded_attention(q, k, v, **scores, causal=inputs.causal, **own)
        else:
            # Attention without making keys and values: q·(U c) = (Uᵀ q)·c, and Σ w (V c) =
            # V Σ w c (§2.1.2), so that a token reads kv_rank + R numbers of each earlier one.
            scores = attention_kwargs(self.config, inputs, self.shared_rules)
            q = self._through(q, self.key_up, "bsnh,rnh->bsnr")
            q = jnp.concatenate([q, turned], axis=-1)
            k = jnp.concatenate([vector[:, :, None], shared], axis=-1)
            rank = self.latent.kv_rank
            y, cache = cache.attend(q, k, None, inputs.batch, value_dim=rank, **scores)
            y = self._through(y, self.value_up, "bsnr,rnh->bsnh")
        return self.out(y, seq_axis="residual"), cache

    def cache_spec(self, layout: CacheLayout, window: int | None) -> Any:
        """A layer's cache of vectors with the shared rotary keys behind them; attention's values
        are the vectors."""
        size = self.latent.kv_rank + self.latent.rotary_dim
        return kv_cache_spec(layout, window, (1, size), None, None)

    def costs(self) -> LayerCosts:
        """Costs of one layer; see :mod:`maxlm.models.costs`."""
        config, squeezed = self.config, self.query_down is not None
        first = "query_down.kernel" if squeezed else "query.kernel"
        groups = [
            MatrixGroup((first, "key_down.kernel", "key_rotary.kernel")),
            MatrixGroup(("key_up.kernel", "value_up.kernel"), "latent"),
            MatrixGroup(("out.kernel",), "heads"),
        ]
        if squeezed:
            groups.append(MatrixGroup(("query.kernel",), "latent"))
        sizes = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
        return LayerCosts(tuple(groups), AttentionCosts(*sizes, "heads", self.latent.rotary_dim))

    def _through(self, x: jax.Array, map_: Linear, maths: str) -> jax.Array:
        kernel = materialize(map_.kernel, self.rules, map_.dtype)
        heads = self.rules.spec("batch", "seq", "heads", None)
        return jnp.einsum(maths, x, kernel, out_sharding=heads)
