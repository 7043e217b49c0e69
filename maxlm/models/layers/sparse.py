"""Sparse attention (DeepSeek-V3.2, arXiv 2512.02556, §2.1): latent attention to those
earlier tokens alone that a small indexer chooses.

The indexer scores each earlier token for each query by a few narrow heads; the
``top_k`` best are attended to. Its inputs have no gradient and neither has its choice:
it learns from its own loss alone, that its scores' softmax be the main heads' weights.

Here in XLA: training computes scores of all pairs, a tile of queries at a time, and
masks them; generation reads the chosen vectors alone.

Shapes: B batch, S queries, T keys, D model, N query heads, H head dim, Hv value dim, C
latent dims, P rotary dims, I heads of the indexer, J their size, Q queries of a tile.
"""

from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.models.aux import Aux
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import CacheLayout, LayerCache
from maxlm.models.caches.kinds import kv_cache_spec
from maxlm.models.caches.paged import PagedCache
from maxlm.models.caches.sparse import IndexTokens, SparseCache
from maxlm.models.costs import LayerCosts, MatrixGroup
from maxlm.models.layers.attend import AttentionInputs
from maxlm.models.layers.attention_config import AttentionConfig
from maxlm.models.layers.latent import LatentAttention, LatentProjections
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import Norm, NormConfig
from maxlm.models.layers.rope import rotate
from maxlm.parallel.local import get_layout, make_spec, map_shards

_TILE = 128
"""Queries whose scores with all keys are in memory at once."""


class SparseAttentionConfig(Config):
    """Latent attention to the tokens that an indexer chooses."""

    kind: Literal["sparse_attention"] = "sparse_attention"
    index_eps: ClassVar[float] = 1e-6
    """Of the norm of the indexer's keys."""

    attention: AttentionConfig
    """The attention itself; latent, with a q_rank."""
    index_heads: int = Field(default=64, gt=0)
    """Heads of the indexer. Their scores are cut off below 0: with few of them, many
    tokens tie at 0, of which the earliest are chosen."""
    index_dim: int = Field(default=128, gt=0)
    """Size of one; RoPE turns the first ``latent.rotary_dim`` dimensions."""
    top_k: int = Field(default=2048, gt=0)
    """Tokens that a token attends to, itself perhaps included."""
    loss_weight: float = Field(default=1.0, ge=0)
    """Factor on the indexer's loss, whose gradient reaches the indexer alone."""
    warm_up: bool = False
    """Attend to all earlier tokens, while the indexer learns from all of them (the
    dense stage, §2.1.1)."""

    @model_validator(mode="after")
    def _parts_fit(self):
        attention = self.attention
        latent = attention.latent
        if latent is None or latent.q_rank is None:
            raise MaxlmError(
                "sparse attention without attention.latent.q_rank",
                fix="set attention.latent and its q_rank",
            )
        if latent.rotary_dim > self.index_dim:
            raise MaxlmError(
                f"index_dim={self.index_dim} is below "
                f"latent.rotary_dim={latent.rotary_dim}",
                fix="give the indexer larger heads",
            )
        options = {
            "sinks": attention.sinks,
            "soft_cap": attention.soft_cap,
            "window": attention.window,
            "chunk": attention.chunk,
        }
        for name, value in options.items():
            if value:
                raise MaxlmError(
                    f"sparse attention with attention.{name}", fix="leave it out"
                )
        return self

    @property
    def num_attended(self) -> int | None:
        """Most tokens that a token attends to; None: all before it."""
        return None if self.warm_up else self.top_k

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns the same kind with small heads, for a smoke run of sequences of
        ``seq_len``, a quarter of which a token attends to."""
        return self.model_copy(
            update={
                "attention": self.attention.shrunk(head_dim, seq_len),
                "index_heads": min(self.index_heads, 4),
                "index_dim": head_dim,
                "top_k": max(2, seq_len // 4),
            }
        )


class _Scored(NamedTuple):
    """Arrays that have an entry for each query."""

    q: jax.Array
    """[B, S, N, H]."""
    index_q: jax.Array
    """[B, S, I, J]."""
    index_weight: jax.Array
    """fp32 [B, S, I]."""
    place: jax.Array
    """int32 [B, S]: index in the row."""
    segment: jax.Array
    """int32 [B, S]: 0 is padding."""


class _Keys(NamedTuple):
    """Arrays that have an entry for each key."""

    k: jax.Array
    """[B, T, N, H]."""
    v: jax.Array
    """[B, T, N, Hv]."""
    index_k: jax.Array
    """[B, T, J]."""
    segment: jax.Array
    """int32 [B, T]."""


class SparseAttention(LatentAttention):
    """Latent attention with an indexer (arXiv 2512.02556, eq. 1 and 2).

    Parameters beside those of :class:`~maxlm.models.layers.latent.LatentAttention`:

    - ``index_query`` [q_rank, I, J];
    - ``index_key`` [D, J] and ``index_key_norm``, a LayerNorm;
    - ``index_weight`` [D, I].
    """

    def __init__(
        self, config: SparseAttentionConfig, norm: NormConfig, context: BuildContext
    ):
        attention = config.attention
        latent = attention.latent
        assert latent is not None
        assert latent.q_rank is not None
        super().__init__(attention, norm, context)
        self.sparse = config
        # The indexer is small, and whole on every device that has heads.
        residual = {"embed": context.d_model}
        index_heads = {None: config.index_heads}
        self.index_query = Linear(
            {"embed": latent.q_rank},
            {None: config.index_heads * config.index_dim},
            context,
            bias=False,
        )
        self.index_key = Linear(residual, {None: config.index_dim}, context, bias=False)
        key_norm = NormConfig(kind="layernorm", bias=True, eps=config.index_eps)
        self.index_key_norm = Norm(key_norm, config.index_dim, context)
        self.index_weight = Linear(residual, index_heads, context, bias=False)

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: LayerCache | None = None,
    ) -> MixerOutput:
        """See :class:`~maxlm.models.blocks.Mixer`; without a cache the output has what
        the layer adds to the loss."""
        projections = self.project_input(x, inputs)
        index = self._project_index(x, projections, inputs)
        if cache is not None:
            assert inputs.batch is not None
            q, key = self.make_vectors(projections)
            y, cache = cache.attend_chosen(
                q,
                key,
                index,
                inputs.batch,
                rules=self.shared_rules,
                scale=inputs.scale,
                top_k=self.sparse.num_attended,
                value_dim=self.latent.kv_rank,
            )
            y = self.make_head_outputs(y)
            return MixerOutput(self.finish(y, projections.gate), cache)

        q, k, v = self.make_heads(projections)
        segments = inputs.segment_ids
        if segments is None:
            segments = jnp.ones_like(inputs.positions)
        place = jnp.broadcast_to(
            jnp.arange(x.shape[1], dtype=jnp.int32),
            segments.shape,
            out_sharding=jax.typeof(segments).sharding,
        )
        queries = _Scored(q, index.query, index.weight, place, segments)
        keys = _Keys(k, v, index.key, segments)
        y, loss = self._attend_in_tiles(queries, keys, inputs.scale)
        # A name that remat policies keep (models/remat.py).
        y = checkpoint_name(y, "attention")
        aux = Aux(self.sparse.loss_weight * loss, {"index_kl": loss})
        return MixerOutput(self.finish(y, projections.gate), aux=aux)

    def _project_index(
        self, x: jax.Array, projections: LatentProjections, inputs: AttentionInputs
    ) -> IndexTokens:
        """Makes the indexer's queries, keys and weights of heads. What it reads has no
        gradient."""
        config = self.sparse
        assert projections.query_vector is not None
        query = self.index_query(lax.stop_gradient(projections.query_vector))
        query = query.reshape(*query.shape[:2], config.index_heads, config.index_dim)
        key, weight = project(lax.stop_gradient(x), self.index_key, self.index_weight)
        key = self.index_key_norm(key)[:, :, None]
        if inputs.rotary is not None:
            query = rotate(query, inputs.rotary)
            key = rotate(key, inputs.rotary)
        # I^−1/2 of the heads, and J^−1/2 of their scores.
        scale = (config.index_heads * config.index_dim) ** -0.5
        wide = jnp.promote_types(weight.dtype, jnp.float32)
        return IndexTokens(query, key[:, :, 0], weight.astype(wide) * scale)

    def _attend_in_tiles(
        self, queries: _Scored, keys: _Keys, scale: float
    ) -> tuple[jax.Array, jax.Array]:
        """Returns outputs of heads [B, S, N, Hv] and the indexer's loss, summed over
        tokens: a tile's scores are computed again for its gradient."""
        S = queries.place.shape[1]
        tile = min(_TILE, S)
        num_tiles = -(-S // tile)
        missing = num_tiles * tile - S

        def split(x: jax.Array) -> jax.Array:
            """[B, S, ...] → [tiles, B, Q, ...]; what is missing is padding."""
            x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
            return jnp.moveaxis(
                x.reshape(x.shape[0], num_tiles, tile, *x.shape[2:]), 1, 0
            )

        attend = jax.checkpoint(
            partial(
                _attend_tile,
                scale=scale,
                top_k=self.sparse.num_attended,
            )
        )

        def run(loss: jax.Array, part: _Scored) -> tuple[jax.Array, jax.Array]:
            y, tile_loss = attend(part, keys)
            return loss + tile_loss, y

        zero = jnp.zeros((), queries.index_weight.dtype)
        loss, y = lax.scan(run, zero, jax.tree.map(split, queries))
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :S], loss

    def cache_spec(self, layout: CacheLayout, window: int | None) -> SparseCache:
        """A layer's cache: vectors as latent attention keeps them, and the indexer's
        keys. Raises MaxlmError: a cache of another kind than pages."""
        vectors = super().cache_spec(layout, window)
        index_keys = kv_cache_spec(
            layout,
            window,
            num_kv_heads=1,
            key_size=self.sparse.index_dim,
            value_size=None,
        )
        if not isinstance(vectors, PagedCache) or not isinstance(
            index_keys, PagedCache
        ):
            raise MaxlmError(
                f"a cache of kind={layout.cache.kind} for sparse attention",
                where="cache",
                fix="use kind=paged",
            )
        return SparseCache(vectors.key, index_keys.key)

    def costs(self) -> LayerCosts:
        """Costs of one layer; see :mod:`maxlm.models.costs`. Scores are of all pairs, as
        training computes them."""
        main = super().costs()
        groups = list(main.matrices)
        groups.append(
            MatrixGroup(("index_query.kernel",), "latent", is_input_detached=True)
        )
        groups.append(
            MatrixGroup(
                ("index_key.kernel", "index_weight.kernel"), is_input_detached=True
            )
        )
        assert main.attention is not None
        index_heads = self.sparse.index_heads
        attention = replace(
            main.attention,
            index_dim=index_heads * (self.sparse.index_dim + 1),
            index_heads=index_heads,
        )
        return LayerCosts(tuple(groups), attention)


def score_index(query: jax.Array, weight: jax.Array, key: jax.Array) -> jax.Array:
    """Scores keys [B, T, J] for queries [B, Q, I, J] with weights fp32 [B, Q, I] (eq. 1):
    fp32 [B, Q, T]."""
    products = jnp.einsum(
        "bqij,btj->bqit", query, key, preferred_element_type=weight.dtype
    )
    return jnp.einsum("bqit,bqi->bqt", jax.nn.relu(products), weight)


def choose_best(scores: jax.Array, is_seen: jax.Array, top_k: int) -> jax.Array:
    """Returns which of the keys that are seen, bool [..., T], are the ``top_k`` best by
    their scores [..., T]; of equal ones the earliest."""
    if top_k >= scores.shape[-1]:
        return is_seen
    scores = jnp.where(is_seen, lax.stop_gradient(scores), -jnp.inf)
    last_best = lax.top_k(scores, top_k)[0][..., -1:]
    is_better = scores > last_best
    is_equal = scores == last_best
    num_better = is_better.sum(axis=-1, keepdims=True)
    rank_among_equal = jnp.cumsum(is_equal.astype(jnp.int32), axis=-1)
    is_chosen = is_better | (is_equal & (rank_among_equal <= top_k - num_better))
    return is_chosen & is_seen


def _choose_on_shards(scores: jax.Array, is_seen: jax.Array, top_k: int) -> jax.Array:
    """Runs :func:`choose_best` of each device's rows: XLA for CPUs would gather all
    devices' scores for a top-k."""
    spec = make_spec(get_layout(scores))
    choose = map_shards(partial(choose_best, top_k=top_k), (spec, spec), spec)
    return choose(lax.stop_gradient(scores), is_seen)


def _attend_tile(
    queries: _Scored, keys: _Keys, *, scale: float, top_k: int | None
) -> tuple[jax.Array, jax.Array]:
    """Attends with a tile of queries; returns outputs [B, Q, N, Hv] and the indexer's
    loss. ``top_k`` None: to all."""
    T = keys.segment.shape[1]
    key_place = jnp.arange(T, dtype=jnp.int32)
    is_seen = queries.place[:, :, None] >= key_place
    is_seen &= queries.segment[:, :, None] == keys.segment[:, None]
    is_query = queries.segment != 0
    is_seen &= is_query[:, :, None]

    index_scores = score_index(queries.index_q, queries.index_weight, keys.index_k)
    is_chosen = is_seen
    if top_k is not None:
        is_chosen = _choose_on_shards(index_scores, is_seen, top_k)

    # Weights [B, N, Q, T], zeros for padding.
    wide = index_scores.dtype
    scores = jnp.einsum(
        "bqnh,btnh->bnqt", queries.q, keys.k, preferred_element_type=wide
    )
    scores = jnp.where(is_chosen[:, None], scores * scale, -jnp.inf)
    weights = _softmax(scores)
    y = jnp.einsum(
        "bnqt,btnh->bqnh",
        weights.astype(keys.v.dtype),
        keys.v,
        preferred_element_type=wide,
    )

    # KL(p ‖ softmax(index scores)), p the main heads' mean weights (§2.1.1).
    target = lax.stop_gradient(weights.mean(axis=1))
    log_index = jnp.where(is_chosen, index_scores, -jnp.inf)
    top = lax.stop_gradient(log_index.max(axis=-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0, top)
    exponentials = jnp.where(is_chosen, jnp.exp(log_index - top), 0)
    total = exponentials.sum(axis=-1, keepdims=True)
    log_total = jnp.log(jnp.where(total > 0, total, 1))
    log_index = jnp.where(is_chosen, index_scores - top - log_total, 0)
    log_target = jnp.log(jnp.where(target > 0, target, 1))
    loss = jnp.sum(target * (log_target - log_index))
    return y.astype(keys.v.dtype), loss


def _softmax(scores: jax.Array) -> jax.Array:
    """Softmax over the last axis; zeros where all scores are −inf."""
    top = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)
