"""LoRA adapters beside an engine's model, each in a slot; they come and go between
steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import reshard

from maxlm.adapters.lora import LoraAdapter
from maxlm.adapters.targets import (
    declare_input_map,
    declare_output_map,
    replace_targets,
)
from maxlm.config import MaxlmError
from maxlm.data.tokenizer import Tokenizer
from maxlm.models.architectures import Model
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.params import (
    AdaptedParam,
    ParamReader,
    Params,
    ParamSpec,
    UnstackedParam,
    flatten_names,
    is_leaf,
    param_specs,
)

LoraWeights = tuple[LoraAdapter, Mapping[str, np.ndarray]]
"""An adapter, and its A and B by canonical name: ``layers.mlp.up.kernel.lora_a``."""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter to load beside a model, and what conversations with it are written
    by."""

    weights: LoraWeights
    tokenizer: Tokenizer | None = None
    """With the model's ids, and a chat template or stops of its own; None: the
    model's."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedLora(AdaptedParam):
    """``x · base + (mask * (x · A)) · B``: of each token the mask leaves the columns of
    its own adapter alone, so that one dense product serves any mix of adapters."""

    lora_a: Any
    """[*inputs, slots · rank]."""
    lora_b: Any
    """[slots · rank, *outputs], multiplied by each adapter's scale."""
    mask: Any
    """[B, S, slots · rank], 0 or 1, the same for all maps."""

    def finish_product(
        self, y: jax.Array, x: jax.Array, reader: ParamReader
    ) -> jax.Array:
        (h,) = reader.multiply(x, reader.read(self.lora_a, (*reader.input_axes, None)))
        h *= reshard(self.mask, jax.typeof(h).sharding.spec)
        return (
            y
            + reader.multiply(h, reader.read(self.lora_b, (None, *reader.output_axes)))[
                0
            ]
        )


def declare_stacked_lora(specs: Params, num_columns: int) -> dict[str, ParamSpec]:
    """Returns declarations of A and B beside all linear maps of layers, by canonical
    name; ``num_columns`` is slots · rank."""
    found: dict[str, ParamSpec] = {}

    def adapt(name: str, spec: ParamSpec) -> ParamSpec:
        # These two of latent attention are not multiplied with what they map alone.
        if not name.endswith((".key_up.kernel", ".value_up.kernel")):
            found[f"{name}.lora_a"] = declare_input_map(spec, num_columns, spec.init)
            found[f"{name}.lora_b"] = declare_output_map(spec, num_columns, spec.init)
        return spec

    replace_targets(specs, None, adapt)
    return found


def add_adapters(
    params: Params, arrays: Mapping[str, Sequence[jax.Array]], mask: jax.Array
) -> Params:
    """Returns unstacked parameters with a :class:`StackedLora` in place of each kernel
    that has A and B; ``arrays`` has each layer's, by canonical name."""
    flat = flatten_names(params, is_leaf)
    structure = jax.tree.structure(params, is_leaf=is_leaf)
    for name in {array.rpartition(".")[0] for array in arrays}:
        parts = flat[name].layers, arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]
        layers = tuple(StackedLora(*own, mask) for own in zip(*parts, strict=True))
        flat[name] = UnstackedParam(layers)
    return jax.tree.unflatten(structure, [*flat.values()])


class AdapterSlots:
    """Slots of one shape for adapters, so that loading one compiles nothing; on the
    current mesh. ``rank`` is the largest; lower ones are padded."""

    def __init__(self, model: Model, num_slots: int, rank: int):
        if num_slots and not isinstance(model, Decoder):
            what = "adapters are loaded beside decoders alone"
            raise MaxlmError(what, where="max_adapters", fix="leave it out")
        self.loaded: dict[str, tuple[int, int]] = {}
        """Each adapter's slot, and the number of its load, which no other load has."""
        self._num_slots = num_slots
        self._rank = rank
        self._num_loads = 0
        specs = (
            declare_stacked_lora(param_specs(model), num_slots * rank)
            if num_slots
            else {}
        )
        self._specs = specs
        rules = model.rules.model_copy(update={"layers": ()})

        def make(spec: ParamSpec) -> list[jax.Array]:
            lead = spec.num_layer_axes
            count = int(np.prod(spec.shape[:lead]))
            layout = rules.spec(*spec.axes[lead:])
            shape = spec.shape[lead:]
            return [
                jnp.zeros(shape, model.dtype, out_sharding=layout) for _ in range(count)
            ]

        self.arrays = {name: make(spec) for name, spec in specs.items()}
        """Each layer's A and B of all slots, by canonical name."""

    def load(self, name: str, weights: LoraWeights) -> None:
        """Writes an adapter into a free slot; see :meth:`Engine.load_adapter`."""
        adapter, arrays = weights
        free = self._list_free_slots()
        tensors = ", ".join(
            f"{name} {list(array.shape)}"
            for name, array in arrays.items()
            if array.shape != self._find_shape(name, adapter.rank)
        )
        changes = adapter.dora or adapter.changes_base
        merge = "merge it (maxlm convert)"
        too_large = (
            f"its rank is {adapter.rank}, slots have {self._rank} (max_adapter_rank)"
        )
        for is_wrong, what, fix in (
            (
                name in self.loaded,
                "it is loaded already",
                "unload it, or use a new name",
            ),
            (not free, f"all {self._num_slots} slots are taken", "raise max_adapters"),
            (changes, "a slot holds no DoRA, nor PiSSA, which changes the base", merge),
            (
                adapter.rank > self._rank,
                too_large,
                f"set max_adapter_rank={adapter.rank}",
            ),
            (
                tensors,
                f"no slot fits {tensors[:300]}",
                f"name one for this base, or {merge}",
            ),
        ):
            if is_wrong:
                raise MaxlmError(what, where=f"adapter {name}", fix=fix)
        self._write(free[0], arrays, adapter.scale)
        self._num_loads += 1
        self.loaded[name] = free[0], self._num_loads

    def get_load_number(self, name: str) -> int:
        """Returns the number of an adapter's load; raises MaxlmError where it is not
        loaded."""
        if name not in self.loaded:
            known = ", ".join(sorted(self.loaded)) or "none"
            what = f"no adapter {name!r} is loaded"
            raise MaxlmError(
                what, where="adapter", fix=f"load it first; loaded are: {known}"
            )
        return self.loaded[name][1]

    def make_masks(self, names: Sequence[str | None]) -> np.ndarray | None:
        """Returns the columns of adapters, bool [names, slots · rank], none of one that
        is not loaded; None: there are no slots."""
        masks = np.zeros((len(names), self._num_slots, self._rank), bool)
        for mask, name in zip(masks, names, strict=True):
            if name in self.loaded:
                mask[self.loaded[name][0]] = True
        return masks.reshape(len(names), -1) if self._num_slots else None

    def warm_up(self) -> None:
        """Compiles what loading needs."""
        for slot in self._list_free_slots()[:1]:
            self._write(slot, {}, 1.0)

    def _list_free_slots(self) -> list[int]:
        return sorted(
            {*range(self._num_slots)} - {slot for slot, _ in self.loaded.values()}
        )

    def _find_shape(self, name: str, rank: int) -> tuple[int, ...] | None:
        """The shape of an adapter's array; None: no slot has it."""
        spec = self._specs.get(name)
        if spec is None:
            return None
        shape = [*spec.shape]
        shape[-1 if name.endswith("lora_a") else spec.num_layer_axes] = rank
        return tuple(shape)

    def _write(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        """Overwrites a slot; what ``arrays`` do not have becomes 0."""
        for name, layers in self.arrays.items():
            is_a = name.endswith("lora_a")
            lead = self._specs[name].num_layer_axes
            own = np.zeros(self._find_shape(name, self._rank) or (), np.float32)
            array = arrays.get(name)
            if array is not None:
                own[tuple(map(slice, array.shape))] = array if is_a else array * scale
            own = own.reshape(-1, *own.shape[lead:])
            start = np.int32(slot * self._rank)
            dim = own.ndim - 2 if is_a else 0
            layers[:] = (
                write_columns(*pair, start, dim)
                for pair in zip(layers, own, strict=True)
            )


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def write_columns(
    stacked: jax.Array, own: jax.Array, start: jax.Array, dim: int
) -> jax.Array:
    """Writes a layer's A or B into its slot's columns, from ``start`` on."""
    own = reshard(own.astype(stacked.dtype), jax.typeof(stacked).sharding.spec)
    return lax.dynamic_update_slice_in_dim(stacked, own, start, dim)
