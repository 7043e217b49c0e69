"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), as PEFT defines them."""

from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import reshard
from pydantic import Field

from maxlm.adapters.targets import (
    declare_input_map,
    declare_output_map,
    declare_vector,
    replace_targets,
    split_dims,
)
from maxlm.config import MaxlmError
from maxlm.models.adapters import Adapter
from maxlm.models.params import (
    AdaptedParam,
    Initializer,
    Leaf,
    ParamReader,
    Params,
    ParamSpec,
    RowReader,
    ShardedWeight,
    is_leaf,
)
from maxlm.parallel.local import get_layout, make_spec

_TINY = 1e-30
"""Least norm that is divided by: an output whose weights are all 0 stays 0."""
_NUM_SEEDS = 1 << 24
"""Whole numbers that fp32 holds exactly."""
_MICRO_BATCH_STRIDE = 7_919
"""A prime, so that the seeds of neighbouring micro-batches differ."""


def _get_array(param: Any) -> Any:
    """The array that is trained, of a parameter that is kept whole beside it too."""
    return getattr(param, "value", param)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraParam(AdaptedParam):
    """``x · base + scale · (x · A) · B``, or with DoRA (Liu et al. 2024, arXiv
    2402.09353, §4.1) that times ``magnitude / ‖base + scale · A · B‖`` for each output.
    Norms have no gradient."""

    lora_a: Any
    """[..., *inputs, rank]."""
    lora_b: Any
    """[..., rank, *outputs]."""
    lora_magnitude: Any
    """[..., *outputs], each magnitude's difference from the base's norm: with zeros the
    model is the base bit for bit, and gradients are those of the magnitude. None: no
    DoRA."""
    scale: float = field(metadata={"static": True})
    dropout: float = field(default=0.0, kw_only=True, metadata={"static": True})
    dropout_seed: Any = field(default=None, kw_only=True)
    """fp32 [...], a whole number below 2^24 for each layer: it begins the random
    numbers of a training step's dropout. Floating, so that it may stand beside
    parameters that are differentiated. None: no input is dropped, as at inference."""

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        base, own = self._read(reader)
        return ShardedWeight(own._multiply_out(), base.compute_layout)

    def finish_product(
        self, y: jax.Array, x: jax.Array, reader: ParamReader
    ) -> jax.Array:
        in_axes, out_axes = self._axes(reader)

        def map_inputs(x: jax.Array) -> jax.Array:
            return reader.multiply(
                self._drop_inputs(x), reader.read(self.lora_a, in_axes)
            )[0]

        # What is left of x is computed again in the backward pass, rather than kept for
        # each map.
        h = (
            map_inputs(x)
            if self.dropout_seed is None
            else jax.checkpoint(map_inputs)(x)
        )
        (added,) = reader.multiply(h, reader.read(self.lora_b, out_axes))
        return self._scale_outputs(y + self.scale * added, reader)

    def merge(self) -> jax.Array | None:
        return None if isinstance(self.base, Leaf) else self._multiply_out()

    def seed_dropout(self, specs: Self, key: jax.Array) -> Self:
        if not self.dropout:
            return self
        shape = specs.lora_a.shape[: specs.lora_a.num_layer_axes]
        seeds = jax.random.randint(key, shape, 0, _NUM_SEEDS).astype(jnp.float32)
        if shape and not jax.sharding.get_abstract_mesh().empty:
            layout = get_layout(_get_array(self.lora_a))[: len(shape)]
            seeds = reshard(seeds, make_spec(layout))
        return replace(self, dropout_seed=seeds)

    def seed_micro_batch(self, index: jax.Array) -> Self:
        if self.dropout_seed is None:
            return self
        seeds = (
            self.dropout_seed.astype(jnp.uint32) + index * _MICRO_BATCH_STRIDE
        ) % _NUM_SEEDS
        return replace(self, dropout_seed=seeds.astype(jnp.float32))

    def _drop_inputs(self, x: jax.Array) -> jax.Array:
        if self.dropout_seed is None:
            return x
        key = jax.random.key(_get_array(self.dropout_seed).astype(jnp.uint32))
        meshless = jax.sharding.get_abstract_mesh().empty
        layout: Any = {} if meshless else {"out_sharding": jax.typeof(x).sharding}
        bits = jax.random.bits(key, x.shape, jnp.uint32, **layout)
        is_kept = bits >= np.uint32(self.dropout * 2**32)
        return jnp.where(is_kept, x / (1 - self.dropout), 0).astype(x.dtype)

    def split_principal(self) -> Self:
        """Takes the base's largest singular values and vectors out of it, into A and B
        (PiSSA, Meng et al. 2024, arXiv 2404.02948, eq. 2–4)."""
        lead = self._lead
        rank = self.lora_a.shape[-1]
        shape = prod(self.lora_a.shape[lead:-1]), prod(self.lora_b.shape[lead + 1 :])

        def factor(kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
            root = jnp.sqrt(s[:rank] / self.scale)
            a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
            return (
                kernel - self.scale * jnp.matmul(a, b, precision=lax.Precision.HIGHEST),
                a,
                b,
            )

        parts = lax.map(factor, self.base.astype(jnp.float32).reshape(-1, *shape))
        names = "base", "lora_a", "lora_b"
        own = {
            n: x.reshape(getattr(self, n).shape)
            for n, x in zip(names, parts, strict=True)
        }
        own = replace(self, **own | {"base": own["base"].astype(self.base.dtype)})
        if self.lora_magnitude is None:
            return own
        before, after = own._compute_norms()
        return replace(own, lora_magnitude=after - before)

    @property
    def _lead(self) -> int:
        """Dimensions before the inputs: layers, experts."""
        return self.lora_a.ndim + self.lora_b.ndim - self.base.ndim - 2

    def _axes(
        self, reader: ParamReader
    ) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        """Logical axes of one layer's A and B."""
        lead, end = split_dims(reader.spec)
        axes = reader.spec.axes
        layers = reader.spec.num_layer_axes
        return (*axes[layers:end], None), (*axes[layers:lead], None, *axes[end:])

    def _read(self, reader: ParamReader) -> tuple[ShardedWeight, Self]:
        """Reads the base, and all arrays in its layout."""
        base = reader.read(self.base)
        in_axes, out_axes = self._axes(reader)
        lead = self._lead
        layout = get_layout(base.value)
        end = len(in_axes) - 1

        def read(
            param: Any, axes: tuple[str | None, ...], *layout: Any, **how: Any
        ) -> Any:
            if param is not None:
                return reshard(
                    replace(reader, **how).read(param, axes).value, make_spec(layout)
                )

        outer, outputs = layout[:lead], layout[end:]
        vector = *out_axes[:lead], *out_axes[lead + 1 :]
        return base, replace(
            self,
            base=base.value,
            lora_a=read(self.lora_a, in_axes, *layout[:end], ()),
            lora_b=read(self.lora_b, out_axes, *outer, (), *outputs),
            lora_magnitude=read(
                self.lora_magnitude, vector, *outer, *outputs, dtype=jnp.float32
            ),
        )

    def _scale_outputs(self, y: jax.Array, reader: ParamReader) -> jax.Array:
        """Scales results [B, S, *outputs] to DoRA's magnitudes."""
        if self.lora_magnitude is None:
            return y
        factors = self._read(reader)[1]._compute_factors()
        return y * reshard(
            factors.astype(y.dtype), make_spec(get_layout(y)[-factors.ndim :])
        )

    def _compute_factors(self) -> jax.Array:
        before, after = self._compute_norms()
        return (before + self.lora_magnitude) / jnp.maximum(after, _TINY)

    def _multiply_out(self) -> jax.Array:
        """Computes the kernel whose product this is."""
        lead = self._lead
        outer = tuple(range(self._lead))
        over = ((self.lora_a.ndim - 1,), (lead,)), (outer, outer)
        product = lax.dot_general(
            self.lora_a, self.lora_b, over, precision=lax.Precision.HIGHEST
        )
        kernel = self.base + self.scale * product
        if self.lora_magnitude is None:
            return kernel
        inputs = tuple(range(lead, self.lora_a.ndim - 1))
        return kernel * jnp.expand_dims(self._compute_factors(), inputs).astype(
            kernel.dtype
        )

    def _compute_norms(self) -> tuple[jax.Array, jax.Array]:
        """Computes norms of each output's weights in the base, and in the base with A ·
        B, fp32 [..., *outputs] without gradient; A · B is never made."""
        parts = self.base, self.lora_a, self.lora_b
        w, a, b = (lax.stop_gradient(x.astype(jnp.float32)) for x in parts)
        lead = self._lead
        layout = get_layout(w)
        batch, inputs = tuple(range(lead)), tuple(range(lead, a.ndim - 1))

        def dot(x: jax.Array, y: jax.Array, over: Any, *dims: Any) -> jax.Array:
            meshless = jax.sharding.get_abstract_mesh().empty
            out = None if meshless else make_spec((*layout[:lead], *dims))
            how: Any = {"precision": lax.Precision.HIGHEST, "out_sharding": out}
            return lax.dot_general(x, y, (over, (batch, batch)), **how)

        outputs = layout[a.ndim - 1 :]
        aw, aa = (
            dot(a, w, (inputs, inputs), (), *outputs),
            dot(a, a, (inputs, inputs), (), ()),
        )
        bb = dot(aa, b, ((lead + 1,), (lead,)), (), *outputs)
        added = jnp.sum(b * (2 * self.scale * aw + self.scale**2 * bb), axis=lead)
        squares = jnp.sum(jnp.square(w), axis=inputs)
        return jnp.sqrt(squares), jnp.sqrt(jnp.maximum(squares + added, 0))


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
        in_axes, out_axes = self._axes(reader)
        h = read_rows(self.lora_a, in_axes)
        b = replace(reader, dtype=rows.dtype).read(self.lora_b, out_axes).move()
        out = jax.typeof(rows).sharding.spec
        rows += self.scale * jnp.einsum("...r,rd->...d", h, b, out_sharding=out)
        return self._scale_outputs(rows, reader)

    def merge(self) -> jax.Array | None:
        return None if self.tied else super().merge()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRowsParam(AdaptedParam):
    """A table [V, D], or a head [D, V], with rows of its own in place of some tokens'
    of the base; a head tied to the table has them too."""

    token_rows: Any
    """[tokens, D]."""
    token_ids: tuple[int, ...] = field(metadata={"static": True})
    is_head: bool = field(metadata={"static": True})

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        base = reader.read(self.base)
        axis = reader.spec.axes[0 if self.is_head else 1]
        rows = reader.read(self.token_rows, (None, axis)).value
        return base._replace(value=self._replace_rows(base.value, rows))

    def read_kernel(self, reader: ParamReader) -> ShardedWeight:
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
        table = base.T if self.is_head else base
        is_row = jnp.arange(table.shape[0])[:, None] == jnp.asarray(self.token_ids)
        one_hot = is_row.astype(table.dtype)
        is_replaced = is_row.any(axis=1, keepdims=True)
        layout: dict[str, Any] = {}
        if not jax.sharding.get_abstract_mesh().empty:
            vocab, columns = get_layout(table)
            one_hot = reshard(one_hot, make_spec((vocab, ())))
            is_replaced = reshard(is_replaced, make_spec((vocab, ())))
            rows = reshard(rows, make_spec(((), columns)))
            layout = {"out_sharding": make_spec((vocab, columns))}
        picked = jnp.matmul(one_hot, rows, precision=lax.Precision.HIGHEST, **layout)
        replaced = jnp.where(is_replaced, picked, table)
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
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    @property
    def changes_base(self) -> bool:
        return self.init == "pissa"

    def adapt(self, specs: Params) -> Params:
        adapt = partial(self._adapt_one, tied="head" not in specs)
        adapted = replace_targets(specs, self.targets, adapt)
        if not self.token_ids:
            return adapted
        table = self._add_token_rows(adapted["embedding"]["table"], is_head=False)
        adapted = {**adapted, "embedding": {**adapted["embedding"], "table": table}}
        if self.token_head and "head" in adapted:
            kernel = self._add_token_rows(adapted["head"]["kernel"], is_head=True)
            adapted["head"] = {**adapted["head"], "kernel": kernel}
        return adapted

    def _add_token_rows(self, spec: Any, *, is_head: bool) -> TokenRowsParam:
        if is_leaf(spec):
            what = f"the {'head' if is_head else 'table of tokens'} has LoRA, and rows of its own"
            raise MaxlmError(
                what, where="adapter.token_ids", fix="take it out of adapter.targets"
            )
        size, columns = spec.shape[::-1] if is_head else spec.shape
        wrong = [i for i in self.token_ids if not 0 <= i < size]
        if wrong or len({*self.token_ids}) < len(self.token_ids):
            what = f"{(wrong or self.token_ids)[0]} is no row of the model's table, or named twice"
            fix = f"name different ids below model.vocab_size={size}"
            raise MaxlmError(what, where="adapter.token_ids", fix=fix)
        axis = spec.axes[0 if is_head else 1]
        zeros = jax.nn.initializers.zeros
        rows = ParamSpec((len(self.token_ids), columns), (None, axis), zeros, "table")
        return TokenRowsParam(spec, rows, self.token_ids, is_head)

    def init_from_base(self, params: Params) -> Params:
        if self.init != "pissa" and not self.token_ids:
            return params

        def split(held: Any) -> Any:
            if isinstance(held, TokenRowsParam):
                return held.take_base_rows()
            is_map = isinstance(held, LoraParam) and not isinstance(held, LoraTable)
            if self.init != "pissa" or not is_map:
                return held
            layouts = jax.tree.map(lambda x: x.sharding.spec, held)
            run: Any = jax.sharding.auto_axes(
                LoraParam.split_principal, out_sharding=layouts
            )
            with jax.set_mesh(held.base.sharding.mesh):
                return jax.jit(run)(held)

        return jax.tree.map(split, params, is_leaf=is_leaf)

    def _adapt_one(self, name: str, spec: ParamSpec, tied: bool) -> LoraParam:
        zeros = jax.nn.initializers.zeros
        lead, end = split_dims(spec)
        sides = prod(spec.shape[lead:end]), prod(spec.shape[end:])
        if self.init == "pissa" and self.rank > min(sides):
            what = (
                f"adapter.rank={self.rank}, and {name} has {min(sides)} singular values"
            )
            raise MaxlmError(
                what, where="adapter.init", fix="lower the rank, or its targets"
            )
        if self.dropout and "expert" in spec.axes:
            what = f"dropout of the inputs of the experts {name} is not implemented"
            raise MaxlmError(
                what, where="adapter.dropout", fix="set it to 0, or other targets"
            )
        if self.dora and "expert" in spec.axes:
            what = f"DoRA of the experts {name} is not implemented"
            raise MaxlmError(
                what, where="adapter.dora", fix="set it to false, or other targets"
            )
        first = _draw_uniform(sides[0])
        second = zeros
        if not spec.contracting_dims:  # as PEFT: the rows' part is zero
            first = zeros
            second = jax.nn.initializers.normal(1.0)
        magnitude = declare_vector(spec, zeros) if self.dora else None
        parts = (
            *(spec, declare_input_map(spec, self.rank, first)),
            *(declare_output_map(spec, self.rank, second), magnitude, self.scale),
        )
        if not spec.contracting_dims:
            return LoraTable(*parts, tied=tied)
        return LoraParam(*parts, dropout=self.dropout)


def _draw_uniform(num_inputs: int) -> Initializer:
    """Draws uniformly within ± 1 / √inputs, as torch's linear maps and PEFT's A."""
    limit = num_inputs**-0.5
    return lambda key, shape, dtype: jax.random.uniform(
        key, shape, dtype, -limit, limit
    )
