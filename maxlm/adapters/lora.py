"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), as PEFT defines them.

Shapes: B batch, S sequence, D model, V vocabulary. A map's A is [..., *inputs, rank] and
its B [..., rank, *outputs], where ... are dimensions of layers and of experts.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import reshard
from jax.typing import DTypeLike
from pydantic import Field

from maxlm.adapters.targets import (
    declare_input_map,
    declare_output_map,
    declare_vector,
)
from maxlm.config import MaxlmError
from maxlm.models.adapters import Adapter
from maxlm.models.params import (
    AdaptedParam,
    GatheredParam,
    Initializer,
    Leaf,
    ParamReader,
    Params,
    ParamSpec,
    RowReader,
    ShardedWeight,
    StoredParam,
    StoredWeight,
    get_base,
    get_dense_spec,
    is_leaf,
)
from maxlm.models.targets import replace_targets, split_dims
from maxlm.parallel.local import Dims, get_layout, make_spec

_MIN_NORM = 1e-30
"""Least norm that is divided by: an output whose weights are all 0 stays 0."""
_NUM_SEEDS = 1 << 24
"""Whole numbers that fp32 holds exactly."""
_MICRO_BATCH_STRIDE = 7_919
"""A prime, so that the seeds of neighbouring micro-batches differ."""


Axes = tuple[str | None, ...]
"""Logical axes of an array's dimensions."""


def _get_trained_array(param: StoredParam) -> jax.Array:
    """Returns the array that is trained, of a parameter that is kept whole beside it
    too."""
    return param.value if isinstance(param, GatheredParam) else param


def _has_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraParam(AdaptedParam):
    """``x · base + scale · (x · A) · B``, or with DoRA (Liu et al. 2024, arXiv
    2402.09353, §4.1) that times ``magnitude / ‖base + scale · A · B‖`` for each output.
    Norms have no gradient."""

    lora_a: StoredParam
    """[..., *inputs, rank]."""
    lora_b: StoredParam
    """[..., rank, *outputs]."""
    lora_magnitude: StoredParam
    """[..., *outputs], each magnitude's difference from the base's norm: with zeros the
    model is the base bit for bit, and gradients are those of the magnitude. None: no
    DoRA."""
    scale: float = field(metadata={"static": True})
    dropout: float = field(default=0.0, kw_only=True, metadata={"static": True})
    dropout_seed: StoredParam = field(default=None, kw_only=True)
    """fp32 [...], a whole number below 2^24 for each layer: it begins the random
    numbers of a training step's dropout. Floating, so that it may stand beside
    parameters that are differentiated. None: no input is dropped, as at inference."""

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        base, arrays = self._read_arrays(reader)
        return ShardedWeight(arrays._multiply_out(), base.compute_layout)

    def finish_product(
        self, y: jax.Array, x: jax.Array, reader: ParamReader
    ) -> jax.Array:
        a_axes, b_axes = self._list_axes(reader)

        def multiply_by_a(x: jax.Array) -> jax.Array:
            """[B, S, *inputs] → [B, S, rank]."""
            x = self._drop_inputs(x)
            (hidden,) = reader.multiply(x, reader.read(self.lora_a, a_axes))
            return hidden

        if self.dropout_seed is not None:
            # What is left of x is computed again in the backward pass, rather than kept
            # for each map.
            multiply_by_a = jax.checkpoint(multiply_by_a)
        hidden = multiply_by_a(x)
        (product,) = reader.multiply(hidden, reader.read(self.lora_b, b_axes))
        return self._scale_outputs(y + self.scale * product, reader)

    def merge(self) -> jax.Array | None:
        return None if isinstance(self.base, Leaf) else self._multiply_out()

    def seed_dropout(self, specs: Self, key: jax.Array) -> Self:
        if not self.dropout:
            return self
        shape = specs.lora_a.shape[: specs.lora_a.num_layer_axes]
        seeds = jax.random.randint(key, shape, 0, _NUM_SEEDS).astype(jnp.float32)
        if shape and _has_mesh():
            layout = get_layout(_get_trained_array(self.lora_a))[: len(shape)]
            seeds = reshard(seeds, make_spec(layout))
        return replace(self, dropout_seed=seeds)

    def seed_micro_batch(self, index: jax.Array) -> Self:
        if self.dropout_seed is None:
            return self
        seeds = self.dropout_seed.astype(jnp.uint32) + index * _MICRO_BATCH_STRIDE
        seeds = seeds % _NUM_SEEDS
        return replace(self, dropout_seed=seeds.astype(jnp.float32))

    def _drop_inputs(self, x: jax.Array) -> jax.Array:
        if self.dropout_seed is None:
            return x
        seed = _get_trained_array(self.dropout_seed).astype(jnp.uint32)
        out_sharding = jax.typeof(x).sharding if _has_mesh() else None
        bits = jax.random.bits(
            jax.random.key(seed), x.shape, jnp.uint32, out_sharding=out_sharding
        )
        # A share `dropout` of all 32-bit numbers lies below this.
        threshold = np.uint32(self.dropout * 2**32)
        is_left = bits >= threshold
        return jnp.where(is_left, x / (1 - self.dropout), 0).astype(x.dtype)

    def split_principal(self) -> Self:
        """Takes the base's largest singular values and vectors out of it, into A and B
        (PiSSA, Meng et al. 2024, arXiv 2404.02948, eq. 2–4)."""
        lead = self._num_lead_dims
        rank = self.lora_a.shape[-1]
        num_inputs = prod(self.lora_a.shape[lead:-1])
        num_outputs = prod(self.lora_b.shape[lead + 1 :])

        def split_kernel(kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """[inputs, outputs] → the residual, A and B, with scale · A · B the
            principal part."""
            u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
            root = jnp.sqrt(s[:rank] / self.scale)
            a = u[:, :rank] * root
            b = root[:, None] * vt[:rank]
            product = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
            return kernel - self.scale * product, a, b

        kernels = self.base.astype(jnp.float32).reshape(-1, num_inputs, num_outputs)
        residual, a, b = lax.map(split_kernel, kernels)
        residual = residual.reshape(self.base.shape)
        a = a.reshape(self.lora_a.shape)
        b = b.reshape(self.lora_b.shape)
        base = residual.astype(self.base.dtype)
        split = replace(self, base=base, lora_a=a, lora_b=b)
        if self.lora_magnitude is None:
            return split
        # Magnitudes are of the base as it was: the sum of both parts.
        base_norms, sum_norms = split._compute_norms()
        return replace(split, lora_magnitude=sum_norms - base_norms)

    @property
    def _num_lead_dims(self) -> int:
        """Dimensions before the inputs: layers, experts."""
        return self.lora_a.ndim + self.lora_b.ndim - self.base.ndim - 2

    def _list_axes(self, reader: ParamReader) -> tuple[Axes, Axes]:
        """Returns the logical axes of one layer's A and B."""
        axes = reader.spec.axes
        input_start, output_start = split_dims(reader.spec)
        # Of one layer: experts alone are left before the inputs.
        expert_axes = axes[reader.spec.num_layer_axes : input_start]
        input_axes = axes[input_start:output_start]
        output_axes = axes[output_start:]
        a_axes = (*expert_axes, *input_axes, None)
        b_axes = (*expert_axes, None, *output_axes)
        return a_axes, b_axes

    def _read_arrays(self, reader: ParamReader) -> tuple[ShardedWeight, Self]:
        """Reads the base, and all arrays in its layout."""
        base = reader.read(self.base)
        a_axes, b_axes = self._list_axes(reader)
        num_lead_dims = replace(self, base=base.value)._num_lead_dims
        output_start = len(a_axes) - 1
        # The base's mesh axes by dimension; rank is a dimension that no axis splits.
        layout = get_layout(base.value)
        lead_layout = layout[:num_lead_dims]
        output_layout = layout[output_start:]
        whole = ()

        def read_in_layout(
            reader: ParamReader, param: StoredParam, axes: Axes, layout: Dims
        ) -> jax.Array:
            return reshard(reader.read(param, axes).value, make_spec(layout))

        a_layout = (*layout[:output_start], whole)
        b_layout = (*lead_layout, whole, *output_layout)
        lora_a = read_in_layout(reader, self.lora_a, a_axes, a_layout)
        lora_b = read_in_layout(reader, self.lora_b, b_axes, b_layout)
        magnitude = None
        if self.lora_magnitude is not None:
            # One a B's output: B's axes without the rank.
            magnitude = read_in_layout(
                replace(reader, dtype=jnp.float32),
                self.lora_magnitude,
                (*b_axes[:num_lead_dims], *b_axes[num_lead_dims + 1 :]),
                (*lead_layout, *output_layout),
            )
        arrays = replace(
            self,
            base=base.value,
            lora_a=lora_a,
            lora_b=lora_b,
            lora_magnitude=magnitude,
        )
        return base, arrays

    def _scale_outputs(self, y: jax.Array, reader: ParamReader) -> jax.Array:
        """Scales results [B, S, *outputs] to DoRA's magnitudes."""
        if self.lora_magnitude is None:
            return y
        _, arrays = self._read_arrays(reader)
        factors = arrays._compute_factors()
        output_layout = get_layout(y)[-factors.ndim :]
        return y * reshard(factors.astype(y.dtype), make_spec(output_layout))

    def _compute_factors(self) -> jax.Array:
        """Computes magnitude / norm of each output, fp32 [..., *outputs]."""
        base_norms, sum_norms = self._compute_norms()
        magnitudes = base_norms + self.lora_magnitude
        return magnitudes / jnp.maximum(sum_norms, _MIN_NORM)

    def _multiply_out(self) -> jax.Array:
        """Computes the kernel whose product this is."""
        num_lead_dims = self._num_lead_dims
        lead_dims = tuple(range(num_lead_dims))
        # A's rank is its last dimension, B's stands behind the leading ones.
        rank_dim_of_a = self.lora_a.ndim - 1
        rank_dims = (rank_dim_of_a,), (num_lead_dims,)
        product = lax.dot_general(
            self.lora_a,
            self.lora_b,
            (rank_dims, (lead_dims, lead_dims)),
            precision=lax.Precision.HIGHEST,
        )
        kernel = self.base + self.scale * product
        if self.lora_magnitude is None:
            return kernel
        input_dims = tuple(range(num_lead_dims, rank_dim_of_a))
        factors = jnp.expand_dims(self._compute_factors(), input_dims)
        return kernel * factors.astype(kernel.dtype)

    def _compute_norms(self) -> tuple[jax.Array, jax.Array]:
        """Computes norms of each output's weights in the base, and in the base with A ·
        B, fp32 [..., *outputs] without gradient; A · B is never made:
        ‖w + s·A·b‖² = ‖w‖² + b·(2s·Aᵀw + s²·AᵀA·b), w and b an output's columns of the
        base and of B."""
        w = lax.stop_gradient(self.base.astype(jnp.float32))
        a = lax.stop_gradient(self.lora_a.astype(jnp.float32))
        b = lax.stop_gradient(self.lora_b.astype(jnp.float32))
        num_lead_dims = self._num_lead_dims
        lead_dims = tuple(range(num_lead_dims))
        input_dims = tuple(range(num_lead_dims, a.ndim - 1))
        layout = get_layout(w)
        lead_layout = layout[:num_lead_dims]
        output_layout = layout[a.ndim - 1 :]
        whole = ()

        def contract(
            x: jax.Array,
            y: jax.Array,
            contracting_dims: tuple[tuple[int, ...], tuple[int, ...]],
            *out_layout: tuple[str, ...],
        ) -> jax.Array:
            """Contracts dimensions of x and y, each layer and expert by itself;
            ``out_layout``: mesh axes of the result's dimensions behind these."""
            out_sharding = None
            if _has_mesh():
                out_sharding = make_spec((*lead_layout, *out_layout))
            return lax.dot_general(
                x,
                y,
                (contracting_dims, (lead_dims, lead_dims)),
                precision=lax.Precision.HIGHEST,
                out_sharding=out_sharding,
            )

        over_inputs = (input_dims, input_dims)
        over_rank = (num_lead_dims + 1,), (num_lead_dims,)
        # Aᵀw and AᵀA·b [..., rank, *outputs], AᵀA [..., rank, rank].
        a_w = contract(a, w, over_inputs, whole, *output_layout)
        a_a = contract(a, a, over_inputs, whole, whole)
        a_a_b = contract(a_a, b, over_rank, whole, *output_layout)
        terms = b * (2 * self.scale * a_w + self.scale**2 * a_a_b)
        added = jnp.sum(terms, axis=num_lead_dims)
        base_squares = jnp.sum(jnp.square(w), axis=input_dims)
        base_norms = jnp.sqrt(base_squares)
        # Rounding may leave less than nothing.
        sum_norms = jnp.sqrt(jnp.maximum(base_squares + added, 0))
        return base_norms, sum_norms


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraTable(LoraParam):
    """A table of rows ``base[id] + scale · A[id] · B``; a head tied to it reads the
    base."""

    tied: bool = field(metadata={"static": True})

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        return reader.read(self.base)

    def look_up(self, read_rows: RowReader, reader: ParamReader) -> jax.Array:
        rows = read_rows(self.base, ())
        a_axes, b_axes = self._list_axes(reader)
        a_rows = read_rows(self.lora_a, a_axes)  # [..., S, rank]
        b = replace(reader, dtype=rows.dtype).read(self.lora_b, b_axes).move()
        row_spec = jax.typeof(rows).sharding.spec
        product = jnp.einsum("...r,rd->...d", a_rows, b, out_sharding=row_spec)
        rows += self.scale * product
        return self._scale_outputs(rows, reader)

    def merge(self) -> jax.Array | None:
        return None if self.tied else super().merge()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRowsParam(AdaptedParam):
    """A table [V, D], or a head [D, V], with rows of its own in place of some tokens'
    of the base; a head tied to the table has them too."""

    token_rows: StoredParam
    """[tokens, D]."""
    token_ids: tuple[int, ...] = field(metadata={"static": True})
    is_head: bool = field(metadata={"static": True})

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        base = reader.read(self.base)
        axis = reader.spec.axes[0 if self.is_head else 1]
        rows = reader.read(self.token_rows, (None, axis)).value
        return base._replace(value=self._replace_rows(base.value, rows))

    def read_kernel(self, reader: ParamReader) -> StoredWeight:
        return self.materialize(reader)

    def merge(self) -> jax.Array | None:
        if isinstance(self.base, Leaf):
            return None
        return self._replace_rows(jnp.asarray(self.base, jnp.float32), self.token_rows)

    def take_base_rows(self) -> Self:
        """Returns the table with the base's own rows as the trained ones."""
        table = self.base.T if self.is_head else self.base
        rows = table.at[np.asarray(self.token_ids)].get(
            out_sharding=jax.typeof(self.token_rows).sharding
        )
        return replace(self, token_rows=rows.astype(self.token_rows.dtype))

    def _replace_rows(self, base: jax.Array, rows: jax.Array) -> jax.Array:
        # A product with ones and zeros, which XLA splits over any mesh as it stands.
        table = base.T if self.is_head else base  # [V, D]
        token_id = jnp.arange(table.shape[0])[:, None]
        is_row = token_id == jnp.asarray(self.token_ids)  # [V, tokens]
        one_hot = is_row.astype(table.dtype)
        is_replaced = is_row.any(axis=1, keepdims=True)
        out_sharding = None
        if _has_mesh():
            vocab_axes, column_axes = get_layout(table)
            one_hot = reshard(one_hot, make_spec((vocab_axes, ())))
            is_replaced = reshard(is_replaced, make_spec((vocab_axes, ())))
            rows = reshard(rows, make_spec(((), column_axes)))
            out_sharding = make_spec((vocab_axes, column_axes))
        new_rows = jnp.matmul(
            one_hot,
            rows,
            precision=lax.Precision.HIGHEST,
            out_sharding=out_sharding,
        )
        replaced = jnp.where(is_replaced, new_rows, table)
        return replaced.T if self.is_head else replaced


class LoraAdapter(Adapter):
    """Low-rank matrices beside kernels: LoRA, rsLoRA, DoRA, PiSSA."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, gt=0)
    """Columns of A, rows of B."""
    alpha: float = Field(default=16.0, gt=0)
    """What they add is multiplied by alpha / rank."""
    rank_stabilized: bool = False
    """Multiply by alpha / √rank (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732), so that
    large ranks learn as fast as small ones."""
    dora: bool = False
    """Learn each output's magnitude apart from its direction (DoRA)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each map's inputs that training sets to 0 on the way to A, other ones in
    each step and layer; the others are multiplied by 1 / (1 - dropout). 0: none."""
    init: Literal["default", "pissa"] = "default"
    """default: A is random and B zero, so that the first step is the base's. pissa: A
    and B are the base's principal singular vectors, and the base keeps the rest."""
    targets: tuple[str, ...] | None = None
    """Maps that are adapted, by names such as `query` and `mlp.up` or patterns of full
    names such as `layers.attention.*`; `experts`: those of routed experts; `embedding`:
    the table of tokens; null: all linear maps of layers but for routed experts."""
    token_ids: tuple[int, ...] = ()
    """Tokens whose rows of the embedding table are trained as they are, such as special
    ones that a tokenizer was given for tuning: PEFT's `trainable_token_indices`."""
    token_head: bool = False
    """Train these tokens' rows of the output head too, where it is not the embedding
    table."""

    @property
    def scale(self) -> float:
        divisor = self.rank**0.5 if self.rank_stabilized else self.rank
        return self.alpha / divisor

    @property
    def changes_base(self) -> bool:
        return self.init == "pissa"

    def adapt(self, specs: Params) -> Params:
        adapt = partial(self._adapt_one, tied="head" not in specs)
        adapted = replace_targets(specs, self.targets, adapt, setting="adapter.targets")
        if not self.token_ids:
            return adapted
        table = self._add_token_rows(adapted["embedding"]["table"], is_head=False)
        adapted = {**adapted, "embedding": {**adapted["embedding"], "table": table}}
        if self.token_head and "head" in adapted:
            kernel = self._add_token_rows(adapted["head"]["kernel"], is_head=True)
            adapted["head"] = {**adapted["head"], "kernel": kernel}
        return adapted

    def _add_token_rows(self, stored: StoredParam, *, is_head: bool) -> TokenRowsParam:
        if get_base(stored) is not stored:
            name = "head" if is_head else "table of tokens"
            raise MaxlmError(
                f"the {name} has LoRA, and rows of its own",
                where="adapter.token_ids",
                fix="take it out of adapter.targets",
            )
        spec = get_dense_spec(stored)
        # A head is [D, V], a table [V, D].
        if is_head:
            d_model, vocab_size = spec.shape
            d_model_axis, _ = spec.axes
        else:
            vocab_size, d_model = spec.shape
            _, d_model_axis = spec.axes
        num_tokens = len(self.token_ids)
        outside = [
            token_id for token_id in self.token_ids if not 0 <= token_id < vocab_size
        ]
        has_doubles = len(set(self.token_ids)) < num_tokens
        if outside or has_doubles:
            token_id = outside[0] if outside else self.token_ids[0]
            raise MaxlmError(
                f"{token_id} is no row of the model's table, or named twice",
                where="adapter.token_ids",
                fix=f"name different ids below model.vocab_size={vocab_size}",
            )
        rows = ParamSpec(
            (num_tokens, d_model),
            (None, d_model_axis),
            jax.nn.initializers.zeros,
            "table",
        )
        return TokenRowsParam(stored, rows, self.token_ids, is_head)

    def init_from_base(self, params: Params) -> Params:
        if self.init != "pissa" and not self.token_ids:
            return params

        def init_leaf(param: StoredParam) -> StoredParam:
            if isinstance(param, TokenRowsParam):
                return param.take_base_rows()
            is_map = isinstance(param, LoraParam) and not isinstance(param, LoraTable)
            if self.init == "pissa" and is_map:
                return _split_principal_sharded(param)
            return param

        return jax.tree.map(init_leaf, params, is_leaf=is_leaf)

    def _adapt_one(
        self, name: str, spec: ParamSpec, stored: StoredParam, tied: bool
    ) -> LoraParam:
        input_start, output_start = split_dims(spec)
        num_inputs = prod(spec.shape[input_start:output_start])
        num_outputs = prod(spec.shape[output_start:])
        num_singular_values = min(num_inputs, num_outputs)
        if self.init == "pissa" and self.rank > num_singular_values:
            raise MaxlmError(
                f"adapter.rank={self.rank}, and {name} has {num_singular_values} "
                "singular values",
                where="adapter.init",
                fix="lower the rank, or its targets",
            )
        if self.init == "pissa" and is_leaf(stored):
            raise MaxlmError(
                f"{name} is stored quantized, and singular vectors are taken out of a "
                "base in full precision",
                where="adapter.init",
                fix="use default",
            )
        if self.dropout and "expert" in spec.axes:
            raise MaxlmError(
                f"dropout of the inputs of the experts {name} is not implemented",
                where="adapter.dropout",
                fix="set it to 0, or other targets",
            )
        if self.dora and "expert" in spec.axes:
            raise MaxlmError(
                f"DoRA of the experts {name} is not implemented",
                where="adapter.dora",
                fix="set it to false, or other targets",
            )

        # One of A and B begins with zeros, so that the first step is the base's; of a
        # table it is A, as in PEFT.
        zeros = jax.nn.initializers.zeros
        is_table = not spec.contracting_dims
        if is_table:
            a_init = zeros
            b_init = jax.nn.initializers.normal(1.0)
        else:
            a_init = _draw_uniform(num_inputs)
            b_init = zeros
        lora_a = declare_input_map(spec, self.rank, a_init)
        lora_b = declare_output_map(spec, self.rank, b_init)
        magnitude = declare_vector(spec, zeros) if self.dora else None
        if is_table:
            return LoraTable(stored, lora_a, lora_b, magnitude, self.scale, tied=tied)
        return LoraParam(
            stored, lora_a, lora_b, magnitude, self.scale, dropout=self.dropout
        )


def _split_principal_sharded(param: LoraParam) -> LoraParam:
    """Runs :meth:`LoraParam.split_principal` in the layout of its arrays."""
    layouts = jax.tree.map(lambda x: x.sharding.spec, param)
    split_in_layouts = jax.sharding.auto_axes(
        LoraParam.split_principal, out_sharding=layouts
    )
    with jax.set_mesh(param.base.sharding.mesh):
        return jax.jit(split_in_layouts)(param)


def _draw_uniform(num_inputs: int) -> Initializer:
    """Draws uniformly within ± 1 / √inputs, as torch's linear maps and PEFT's A."""
    limit = num_inputs**-0.5

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw
