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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard
from pydantic import Field

from maxlm.adapters.targets import replace_targets
from maxlm.config import MaxlmError
from maxlm.models.adapters import Adapter
from maxlm.models.architectures.config import STACKS
from maxlm.models.params import (
    AdaptedParam,
    ParamReader,
    Params,
    ParamSpec,
    ShardedWeight,
    flatten_names,
)
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

    virtual: Any
    """[n, *outputs]."""

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        return reader.read(self.base)

    def replace_virtual(
        self, y: jax.Array, positions: jax.Array, reader: ParamReader
    ) -> jax.Array:
        num_outputs = y.ndim - positions.ndim
        vectors = reader.read(
            self.virtual, (None, *reader.spec.axes[-num_outputs:])
        ).move()
        layout = get_layout(y)
        num_virtual = len(vectors)
        positions = reshard(positions, make_spec(layout[: positions.ndim]))
        # A product with ones and zeros: XLA splits it and its gradient over any mesh,
        # and a gather whose indices are split over devices not.
        one_hot = (positions[..., None] == jnp.arange(num_virtual)).astype(y.dtype)
        found = jnp.tensordot(
            one_hot, vectors, 1, precision="highest", out_sharding=make_spec(layout)
        )
        is_virtual = jnp.expand_dims(
            positions < num_virtual, tuple(range(-num_outputs, 0))
        )
        return jnp.where(is_virtual, found, y)


class _VirtualTokensAdapter(Adapter):
    num_virtual_tokens: int = Field(default=20, gt=0)
    """Tokens that every example begins with, and that the adapter has parameters
    for."""
    init_std: float = Field(default=0.02, ge=0)
    """Standard deviation of the normal values that they begin with."""

    def _add_vectors(self, spec: ParamSpec) -> VirtualTokens:
        lead = spec.num_layer_axes
        inputs = lead + max(1, len(spec.contracting_dims))  # of a table its rows
        virtual = ParamSpec(
            (*spec.shape[:lead], self.num_virtual_tokens, *spec.shape[inputs:]),
            (*spec.axes[:lead], None, *spec.axes[inputs:]),
            jax.nn.initializers.normal(self.init_std),
            "table",
        )
        return VirtualTokens(spec, virtual)


class PrefixAdapter(_VirtualTokensAdapter):
    """Every layer has keys and values of its own for virtual tokens."""

    kind: Literal["prefix"] = "prefix"

    def adapt(self, specs: Params) -> Params:
        """See :meth:`~maxlm.models.adapters.Adapter.adapt`; raises MaxlmError for
        layers without keys and values."""
        names = {name for name in _KERNELS if name.partition(".")[0] in specs}
        if missing := names - flatten_names(specs).keys():
            what = f"prefix tuning adds keys and values, and the model has no {min(missing)}"
            fix = "use adapter.kind=prompt, or a model with multi-head or grouped attention"
            raise MaxlmError(what, where="adapter.kind", fix=fix)
        return replace_targets(
            specs, [*names], lambda name, spec: self._add_vectors(spec)
        )


class PromptAdapter(_VirtualTokensAdapter):
    """The embedding table has rows of its own for virtual tokens."""

    kind: Literal["prompt"] = "prompt"
    init_token_ids: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Tokens whose embeddings the virtual ones begin with, repeated or cut to their
    number; null: random values."""

    def adapt(self, specs: Params) -> Params:
        table = specs["embedding"]["table"]
        if wrong := [
            i for i in self.init_token_ids or () if not 0 <= i < table.shape[0]
        ]:
            what = f"{wrong[0]} is no row of the model's table, model.vocab_size={table.shape[0]}"
            raise MaxlmError(
                what, where="adapter.init_token_ids", fix="name the tokenizer's ids"
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
        return arrays[_PROMPT] * np.asarray(embedding_scale, arrays[_PROMPT].dtype)
    own = [arrays[name] for name in _PREFIXES if name in arrays]
    pairs = [np.stack(pair, axis=1) for pair in zip(own[::2], own[1::2], strict=True)]
    joined = np.concatenate(pairs)  # [layers, 2, n, K, H]
    return joined.transpose(2, 0, 1, 3, 4).reshape(joined.shape[2], -1)


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
    wanted = num_virtual, sum(prod(shapes[name]) for name in names) // num_virtual
    if prompt_embeddings.shape != wanted:
        what = f"prompt_embeddings is {[*prompt_embeddings.shape]}, and {[*wanted]} in this model"
        raise MaxlmError(
            what, fix="use an adapter of this model, with as many virtual tokens"
        )
    if is_prompt:
        return {
            _PROMPT: prompt_embeddings
            / np.asarray(embedding_scale, prompt_embeddings.dtype)
        }
    heads = shapes[names[0]][2:]
    depths = [shapes[name][0] for name in names[::2]]
    joined = prompt_embeddings.reshape(num_virtual, -1, 2, *heads).transpose(
        1, 2, 0, 3, 4
    )
    parts = np.split(joined, np.cumsum(depths)[:-1])
    return dict(
        zip(names, [part[:, kind] for part in parts for kind in range(2)], strict=True)
    )
