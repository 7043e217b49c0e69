"""Prefix and prompt tuning: parameters that stand in for the first tokens of every
example.

Examples begin with dummy tokens, whatever their ids, at positions 0 to n - 1 of their
segment, and real tokens begin at position n. What a layer computes of a dummy token is
replaced by parameters: its keys and values in each layer (prefix tuning: Li & Liang
2021, arXiv 2101.00190), or its row of the embedding table (prompt tuning: Lester et al.
2021, arXiv 2104.08691).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.models.adapters import Adapter
from maxlm.models.architectures.runs import STACKS
from maxlm.models.params import (
    AdaptedParam,
    ParamReader,
    Params,
    ParamSpec,
    ShardedWeight,
    StoredParam,
    flatten_names,
    get_dense_spec,
    is_leaf,
)
from maxlm.models.targets import replace_targets
from maxlm.parallel.local import get_layout, make_spec

_KERNELS = [
    f"{stack}.attention.{kind}.kernel" for stack in STACKS for kind in ("key", "value")
]
_PREFIXES = [f"{kernel}.virtual" for kernel in _KERNELS]
_PROMPT = "embedding.table.virtual"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VirtualTokens(AdaptedParam):
    """A kernel or table, and vectors in place of what it gives for virtual tokens."""

    virtual: StoredParam
    """[n, *outputs]."""

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        return reader.read(self.base)

    def replace_virtual(
        self, y: jax.Array, positions: jax.Array, reader: ParamReader
    ) -> jax.Array:
        num_output_dims = y.ndim - positions.ndim
        output_axes = reader.spec.axes[-num_output_dims:]
        vectors = reader.read(self.virtual, (None, *output_axes)).move()
        num_virtual = len(vectors)
        layout = get_layout(y)
        positions = reshard(positions, make_spec(layout[: positions.ndim]))
        # A product with ones and zeros: XLA splits it and its gradient over any mesh,
        # and a gather whose indices are split over devices not.
        one_hot = (positions[..., None] == jnp.arange(num_virtual)).astype(y.dtype)
        replacements = jnp.tensordot(
            one_hot, vectors, 1, precision="highest", out_sharding=make_spec(layout)
        )
        is_virtual = positions < num_virtual
        is_virtual = jnp.expand_dims(is_virtual, tuple(range(-num_output_dims, 0)))
        return jnp.where(is_virtual, replacements, y)


class _VirtualTokensAdapter(Adapter):
    num_virtual_tokens: int = Field(default=20, gt=0)
    """Tokens that every example begins with, and that the adapter has parameters
    for."""
    init_std: float = Field(default=0.02, ge=0)
    """Standard deviation of the normal values that they begin with."""

    def _add_vectors(self, stored: StoredParam) -> VirtualTokens:
        spec = get_dense_spec(stored)
        num_layer_dims = spec.num_layer_axes
        num_input_dims = max(1, len(spec.contracting_dims))  # of a table its rows
        output_start = num_layer_dims + num_input_dims
        virtual = ParamSpec(
            (
                *spec.shape[:num_layer_dims],
                self.num_virtual_tokens,
                *spec.shape[output_start:],
            ),
            (*spec.axes[:num_layer_dims], None, *spec.axes[output_start:]),
            jax.nn.initializers.normal(self.init_std),
            "table",
        )
        return VirtualTokens(stored, virtual)


class PrefixAdapter(_VirtualTokensAdapter):
    """Every layer has keys and values of its own for virtual tokens."""

    kind: Literal["prefix"] = "prefix"

    def adapt(self, specs: Params) -> Params:
        """See :meth:`~maxlm.models.adapters.Adapter.adapt`; raises MaxlmError for
        layers without keys and values."""
        names = {name for name in _KERNELS if name.partition(".")[0] in specs}
        missing = names - flatten_names(specs, is_leaf).keys()
        if missing:
            raise MaxlmError(
                "prefix tuning adds keys and values, and the model has no "
                f"{min(missing)}",
                where="adapter.kind",
                fix="use adapter.kind=prompt, or a model with multi-head or grouped "
                "attention",
            )
        return replace_targets(
            specs,
            list(names),
            lambda name, spec, stored: self._add_vectors(stored),
            setting="adapter.kind",
        )


class PromptAdapter(_VirtualTokensAdapter):
    """The embedding table has rows of its own for virtual tokens."""

    kind: Literal["prompt"] = "prompt"
    init_token_ids: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Tokens whose embeddings the virtual ones begin with, repeated or cut to their
    number; null: random values."""

    def adapt(self, specs: Params) -> Params:
        table = specs["embedding"]["table"]
        vocab_size = get_dense_spec(table).shape[0]
        for token_id in self.init_token_ids or ():
            if not 0 <= token_id < vocab_size:
                raise MaxlmError(
                    f"{token_id} is no row of the model's table, "
                    f"model.vocab_size={vocab_size}",
                    where="adapter.init_token_ids",
                    fix="name the tokenizer's ids",
                )
        return {**specs, "embedding": {"table": self._add_vectors(table)}}

    def init_from_base(self, params: Params) -> Params:
        if self.init_token_ids is None:
            return params
        table = params["embedding"]["table"]
        ids = np.resize(self.init_token_ids, self.num_virtual_tokens)
        rows = table.base.at[ids].get(out_sharding=jax.typeof(table.virtual).sharding)
        rows = rows.astype(table.virtual.dtype)
        return {**params, "embedding": {"table": replace(table, virtual=rows)}}


def to_peft(arrays: Mapping[str, np.ndarray], embedding_scale: float = 1) -> np.ndarray:
    """Returns PEFT's ``prompt_embeddings`` of an adapter's arrays by their canonical
    names: [n, layers · 2 · K · H] of prefixes, [n, D] of prompts.

    Args:
        embedding_scale: factor on embeddings that the published model applies to rows
            that it looks up alone, as Gemma does; PEFT's vectors have it in them.
    """
    if _PROMPT in arrays:
        prompt = arrays[_PROMPT]
        return prompt * np.asarray(embedding_scale, prompt.dtype)
    prefixes = [arrays[name] for name in _PREFIXES if name in arrays]
    # Of each stack of layers its keys, then its values, [layers, n, K, H].
    pairs = [
        np.stack([keys, values], axis=1)
        for keys, values in zip(prefixes[::2], prefixes[1::2], strict=True)
    ]
    joined = np.concatenate(pairs)  # [layers, 2, n, K, H]
    num_virtual = joined.shape[2]
    return joined.transpose(2, 0, 1, 3, 4).reshape(num_virtual, -1)


def from_peft(
    prompt_embeddings: np.ndarray,
    shapes: Mapping[str, Sequence[int]],
    embedding_scale: float = 1,
) -> dict[str, np.ndarray]:
    """Returns an adapter's arrays by their canonical names; inverts :func:`to_peft`.
    Raises MaxlmError: the model has other layers, heads, width or virtual tokens.

    Args:
        shapes: of the arrays to return.
    """
    names = [name for name in (_PROMPT, *_PREFIXES) if name in shapes]
    is_prompt = names[0] == _PROMPT
    num_virtual = shapes[names[0]][0 if is_prompt else 1]
    num_values = sum(prod(shapes[name]) for name in names)
    expected_shape = (num_virtual, num_values // num_virtual)
    if prompt_embeddings.shape != expected_shape:
        raise MaxlmError(
            f"prompt_embeddings is {[*prompt_embeddings.shape]}, and "
            f"{[*expected_shape]} in this model",
            fix="use an adapter of this model, with as many virtual tokens",
        )
    if is_prompt:
        scale = np.asarray(embedding_scale, prompt_embeddings.dtype)
        return {_PROMPT: prompt_embeddings / scale}
    head_shape = shapes[names[0]][2:]
    joined = prompt_embeddings.reshape(num_virtual, -1, 2, *head_shape)
    joined = joined.transpose(1, 2, 0, 3, 4)  # [layers, 2, n, K, H]
    depths = [shapes[name][0] for name in names[::2]]
    arrays = []
    for stack in np.split(joined, np.cumsum(depths)[:-1]):
        arrays += [stack[:, 0], stack[:, 1]]  # keys, values
    return dict(zip(names, arrays, strict=True))
