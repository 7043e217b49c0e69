"""Lightning attention (Qin et al. 2024, arXiv 2401.04658; MiniMax-01, arXiv 2501.08313,
§2.2): attention without softmax, whose scores decay with distance at a fixed rate of
each head and layer, computed in chunks.

Shapes: B batch, S sequence, D model, N heads, H head dim; in inference n rows of T
tokens.
"""

from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from pydantic import Field

from maxlm.config import Config
from maxlm.models.build_context import BuildContext
from maxlm.models.caches import (
    CacheArraySpec,
    CacheLayout,
    RecurrentCache,
    SplitArray,
)
from maxlm.models.costs import LayerCosts, MatrixGroup
from maxlm.models.dtypes import accumulation_dtype
from maxlm.models.layers.attend import AttentionInputs
from maxlm.models.layers.linear import Linear, project
from maxlm.models.layers.mixer_output import MixerOutput
from maxlm.models.layers.norm import NormConfig
from maxlm.models.layers.recurrence_costs import count_kernel_elements
from maxlm.models.params import declare, materialize
from maxlm.models.remat import save_inputs_only
from maxlm.parallel.linear_recurrence import sharded_linear_recurrence
from pallas_kernels.linear_recurrence import linear_recurrence, linear_recurrence_step

CHUNK = 64
"""Tokens of a chunk, whose scores are one product."""
BLOCK_TOKENS = 512
"""Tokens between states that the backward pass keeps."""
_HEAD_AXES = ("heads", "head_dim")


class LightningConfig(Config):
    """Heads of lightning attention."""

    kind: Literal["lightning"] = "lightning"

    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    norm_eps: float | None = Field(default=None, gt=0)
    """Of the norm of all heads' outputs; null: the model's."""

    def shrunk(self, head_dim: int, seq_len: int) -> Self:
        """Returns two small heads."""
        del seq_len
        return self.model_copy(update={"num_heads": 2, "head_dim": head_dim})


class Lightning(nnx.Module):
    """``out(sigmoid(gate(x)) · norm(y))``, where y[t] = Σ_{s ≤ t} e^{−slope · (t − s)}
    (q[t]·k[s]) v[s], within a document, and q, k and v are silu of maps of x.

    Parameters: ``query``, ``key``, ``value`` and ``gate`` [D, N, H], ``out`` [N, H, D],
    ``norm_scale`` [N, H]; and ``slopes`` [N], which are not trained: they follow from
    the head and the layer.
    """

    name = "lightning"
    joint_projections = (("query", "key", "value", "gate"),)

    def __init__(
        self, config: LightningConfig, norm: NormConfig, context: BuildContext
    ):
        self.config = config
        self.rules = context.rules
        self.dtype = context.dtype
        self.balance_sequence = context.parallel.balance_sequence
        self.norm_eps = config.norm_eps or norm.eps
        residual = {"embed": context.d_model}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        self.query = Linear(residual, heads, context, bias=False)
        self.key = Linear(residual, heads, context, bias=False)
        self.value = Linear(residual, heads, context, bias=False)
        self.gate = Linear(residual, heads, context, bias=False)
        self.out = Linear(
            heads, residual, context, bias=False, std=context.residual_std
        )
        ones = jax.nn.initializers.ones
        self.norm_scale = declare(tuple(heads.values()), _HEAD_AXES, ones, "vector")
        self.slopes = declare(
            (config.num_heads,),
            ("heads",),
            ones,
            "vector",
            layer_values=tuple(
                compute_slopes(config.num_heads, layer, context.num_layers)
                for layer in context.layer_numbers
            ),
        )

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: RecurrentCache | None = None
    ) -> MixerOutput:
        """See :class:`~maxlm.models.blocks.Mixer`."""
        products = project(x, self.query, self.key, self.value, self.gate)
        # A name that remat policies keep (models/remat.py).
        *qkv, gate = (checkpoint_name(product, "qkv") for product in products)
        activate = save_inputs_only(jax.nn.silu)
        q, k, v = (activate(product) for product in qkv)
        wide = accumulation_dtype(self.dtype)
        # The gradient is zero, and so is what an optimizer adds.
        slopes = lax.stop_gradient(materialize(self.slopes, self.rules, wide))
        if cache is None:
            y = sharded_linear_recurrence(
                q,
                k,
                v,
                jnp.zeros_like(q[..., 0], wide) - slopes,
                chunk_size=CHUNK,
                rules=self.rules,
                segment_ids=inputs.segment_ids,
                balanced=self.balance_sequence,
            )
        else:
            assert inputs.batch is not None
            y, cache = cache.run(
                _advance,
                [SplitArray(array, _HEAD_AXES) for array in (q, k, v)],
                inputs.batch,
                self.rules,
                params=[SplitArray(slopes, ("heads",))],
                output_axes=_HEAD_AXES,
            )
        scale = materialize(self.norm_scale, self.rules, wide)
        y = save_inputs_only(self._norm_and_gate)(y, gate, scale)
        return MixerOutput(self.out(y, seq_axis="residual"), cache)

    def _norm_and_gate(
        self, y: jax.Array, gate: jax.Array, scale: jax.Array
    ) -> jax.Array:
        """Normalises all heads' outputs together: y and gate [B, S, N, H] → the same,
        in fp32 within."""
        y = y.astype(scale.dtype)
        square = jnp.mean(jnp.square(y), axis=(2, 3), keepdims=True)
        y = y * lax.rsqrt(square + self.norm_eps) * scale
        return (y * jax.nn.sigmoid(gate.astype(scale.dtype))).astype(self.dtype)

    def cache_spec(self, layout: CacheLayout, window: int | None) -> RecurrentCache:
        """A layer's cache, the heads' states [D, rows, N, H, H]; see
        :mod:`maxlm.models.caches`."""
        del window
        config = self.config
        shape = (config.num_heads, config.head_dim, config.head_dim)
        spec = CacheArraySpec(
            (layout.num_shards, layout.num_rows, *shape),
            ("batch", None, "heads", None, None),
            accumulation_dtype(self.dtype),
        )
        return RecurrentCache(spec)

    def costs(self) -> LayerCosts:
        """Counts costs of one layer; see :mod:`maxlm.models.costs`. A token of a head
        is multiplied with the state twice, and with a chunk's keys and values, of which
        a mask leaves half."""
        config = self.config
        projections = tuple(f"{name}.kernel" for name in self.joint_projections[0])
        channels = config.num_heads * config.head_dim
        states = channels * config.head_dim
        flops = channels * 4 * (config.head_dim + CHUNK)
        fp32_share = 4 / jnp.dtype(self.dtype).itemsize
        return LayerCosts(
            (MatrixGroup(projections), MatrixGroup(("out.kernel",), "heads")),
            extra_flops=flops,
            product_flops=flops,
            flops_axes=("heads",),
            # A run's decay a head, and the state behind it.
            exchanged_elements=config.num_heads + states,
            reduced_elements=1,
            saved_elements=channels,
            state_elements=states,
            state_tokens=BLOCK_TOKENS,
            # Queries, keys and values behind silu, decays in fp32, normed outputs.
            intermediate_elements=4 * channels + config.num_heads * fp32_share,
            # Of a block in fp32: its operands, two matrices of each chunk with itself,
            # the state at each chunk, and what is made of these; with their gradients.
            block_elements=2
            * (config.num_heads * (2 * CHUNK + 4 * config.head_dim) + states / CHUNK),
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=CHUNK,
            kernel_elements=count_kernel_elements(
                config.num_heads,
                config.num_heads,
                config.head_dim,
                config.head_dim,
                self.dtype,
            ),
        )


def _advance(
    state: jax.Array,
    tokens: tuple[jax.Array, jax.Array, jax.Array],
    live: jax.Array,
    slopes: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs tokens [n, T, N, H] of rows from a state [n, N, H, H], on one device."""
    q, k, v = tokens
    log_decay = jnp.broadcast_to(-slopes, q.shape[:3])
    if q.shape[1] == 1:
        y, state = linear_recurrence_step(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            log_decay[:, 0],
            state=state,
            token_mask=live[:, 0],
        )
        return state, y[:, None]
    y, state = linear_recurrence(
        q, k, v, log_decay, initial_state=state, token_mask=live, chunk_size=CHUNK
    )
    return state, y


def compute_slopes(num_heads: int, layer: int, num_layers: int) -> tuple[float, ...]:
    """Returns the decay rate of each head: those of ALiBi (Press et al. 2022, arXiv
    2108.12409, §3), 2^(−8h/N) of head h from 1 on, less the deeper the layer (the
    published code of arXiv 2501.08313)."""
    share = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
    return tuple(
        share * 2.0 ** (-8 * head / num_heads) for head in range(1, num_heads + 1)
    )
