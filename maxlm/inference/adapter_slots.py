"""LoRA adapters beside an engine's model, each in a slot; they come and go between
steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import reshard

from maxlm.adapters.lora import LoraAdapter
from maxlm.adapters.targets import declare_input_map, declare_output_map
from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.models.architectures import Model
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.params import (
    AdaptedParam,
    ParamReader,
    Params,
    ParamSpec,
    StoredParam,
    UnstackedParam,
    flatten_names,
    is_leaf,
    param_specs,
)
from maxlm.models.targets import replace_targets

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

    lora_a: jax.Array
    """[*inputs, slots · rank]."""
    lora_b: jax.Array
    """[slots · rank, *outputs], multiplied by each adapter's scale."""
    mask: jax.Array
    """[B, S, slots · rank], 0 or 1, the same for all maps."""

    def finish_product(
        self, y: jax.Array, x: jax.Array, reader: ParamReader
    ) -> jax.Array:
        lora_a = reader.read(self.lora_a, (*reader.input_axes, None))
        # [B, S, slots · rank]
        (h,) = reader.multiply(x, lora_a)
        h *= reshard(self.mask, jax.typeof(h).sharding.spec)
        lora_b = reader.read(self.lora_b, (None, *reader.output_axes))
        # [B, S, *outputs]
        (delta,) = reader.multiply(h, lora_b)
        return y + delta


def declare_stacked_lora(specs: Params, num_columns: int) -> dict[str, ParamSpec]:
    """Returns declarations of A and B beside all linear maps of layers, by canonical
    name; ``num_columns`` is slots · rank."""
    declarations: dict[str, ParamSpec] = {}

    def declare(name: str, spec: ParamSpec, stored: StoredParam) -> StoredParam:
        # Decoding with latent attention absorbs these two into the query and the
        # output: they are not multiplied with their inputs alone.
        if not name.endswith((".key_up.kernel", ".value_up.kernel")):
            lora_a = declare_input_map(spec, num_columns, spec.init)
            lora_b = declare_output_map(spec, num_columns, spec.init)
            declarations[f"{name}.lora_a"] = lora_a
            declarations[f"{name}.lora_b"] = lora_b
        return stored  # visited, not replaced

    replace_targets(specs, None, declare, setting="max_adapters")
    return declarations


def add_adapters(
    params: Params, arrays: Mapping[str, Sequence[jax.Array]], mask: jax.Array
) -> Params:
    """Returns unstacked parameters with a :class:`StackedLora` in place of each kernel
    that has A and B; ``arrays`` has each layer's, by canonical name, or those that
    layers share."""
    flat = flatten_names(params, is_leaf)
    structure = jax.tree.structure(params, is_leaf=is_leaf)
    # "layers.mlp.up.kernel.lora_a" and ".lora_b" stand beside "layers.mlp.up.kernel".
    kernel_names = {array_name.rpartition(".")[0] for array_name in arrays}
    for name in kernel_names:
        base = flat[name]
        is_stacked = isinstance(base, UnstackedParam)
        arrays_by_layer = zip(
            # One that several layers share is in no stack.
            base.layers if is_stacked else (base,),
            arrays[f"{name}.lora_a"],
            arrays[f"{name}.lora_b"],
            strict=True,
        )
        layers = [
            StackedLora(layer_base, lora_a, lora_b, mask)
            for layer_base, lora_a, lora_b in arrays_by_layer
        ]
        flat[name] = UnstackedParam(tuple(layers)) if is_stacked else layers[0]
    return jax.tree.unflatten(structure, [*flat.values()])


class AdapterSlots:
    """Slots of one shape for adapters, so that loading one compiles nothing; on the
    current mesh. ``rank`` is the largest; lower ones are padded."""

    def __init__(self, model: Model, num_slots: int, rank: int):
        if num_slots and not isinstance(model, Decoder):
            message = "adapters are loaded beside decoders alone"
            raise MaxlmError(message, where="max_adapters", fix="leave it out")
        self.loaded: dict[str, tuple[int, int]] = {}
        """Each adapter's slot, and the number of its load, which no other load has."""
        self._num_slots = num_slots
        self._rank = rank
        self._num_loads = 0
        self._specs: dict[str, ParamSpec] = {}
        if num_slots:
            self._specs = declare_stacked_lora(param_specs(model), num_slots * rank)
        rules = model.rules.model_copy(update={"layers": ()})

        def make_layers(spec: ParamSpec) -> list[jax.Array]:
            num_layer_axes = spec.num_layer_axes
            num_layers = prod(spec.shape[:num_layer_axes])
            layer_shape = spec.shape[num_layer_axes:]
            layer_layout = rules.spec(*spec.axes[num_layer_axes:])
            return [
                jnp.zeros(layer_shape, model.dtype, out_sharding=layer_layout)
                for _ in range(num_layers)
            ]

        self.arrays = {name: make_layers(spec) for name, spec in self._specs.items()}
        """Each layer's A and B of all slots, by canonical name."""

    def load(self, name: str, weights: LoraWeights) -> None:
        """Writes an adapter into a free slot; see :meth:`Engine.load_adapter`."""
        adapter, arrays = weights
        free_slots = self._list_free_slots()
        self._check(name, weights, has_free_slot=bool(free_slots))
        slot = free_slots[0]
        self._write(slot, arrays, adapter.scale)
        self._num_loads += 1
        self.loaded[name] = (slot, self._num_loads)

    def _check(self, name: str, weights: LoraWeights, *, has_free_slot: bool) -> None:
        """Checks that an adapter fits a slot; raises MaxlmError."""
        adapter, arrays = weights
        where = f"adapter {name}"
        if name in self.loaded:
            fix = "unload it, or use a new name"
            raise MaxlmError("it is loaded already", where=where, fix=fix)
        if not has_free_slot:
            message = f"all {self._num_slots} slots are taken"
            raise MaxlmError(message, where=where, fix="raise max_adapters")
        if adapter.dora or adapter.changes_base:
            message = "a slot holds no DoRA, nor PiSSA, which changes the base"
            raise MaxlmError(message, where=where, fix="merge it (maxlm convert)")
        if adapter.rank > self._rank:
            message = (
                f"its rank is {adapter.rank}, slots have {self._rank} "
                "(max_adapter_rank)"
            )
            fix = f"set max_adapter_rank={adapter.rank}"
            raise MaxlmError(message, where=where, fix=fix)
        misfits: list[str] = []
        for tensor, array in arrays.items():
            if array.shape != self._compute_shape(tensor, adapter.rank):
                misfits.append(f"{tensor} {list(array.shape)}")
        if misfits:
            message = f"no slot fits {', '.join(misfits)[:300]}"
            fix = "name one for this base, or merge it (maxlm convert)"
            raise MaxlmError(message, where=where, fix=fix)

    def get_load_number(self, name: str) -> int:
        """Returns the number of an adapter's load; raises MaxlmError where it is not
        loaded."""
        if name not in self.loaded:
            loaded_names = ", ".join(sorted(self.loaded)) or "none"
            message = f"no adapter {name!r} is loaded"
            fix = f"load it first; loaded are: {loaded_names}"
            raise MaxlmError(message, where="adapter", fix=fix)
        return self.loaded[name][1]

    def make_masks(self, names: Sequence[str | None]) -> np.ndarray | None:
        """Returns the columns of adapters, bool [names, slots · rank], none of one that
        is not loaded; None: there are no slots."""
        if not self._num_slots:
            return None
        masks = np.zeros((len(names), self._num_slots, self._rank), bool)
        for mask, name in zip(masks, names, strict=True):
            if name in self.loaded:
                slot, _ = self.loaded[name]
                mask[slot] = True
        return masks.reshape(len(names), -1)

    def warm_up(self) -> None:
        """Compiles what loading needs."""
        for slot in self._list_free_slots()[:1]:
            self._write(slot, {}, 1.0)

    def _list_free_slots(self) -> list[int]:
        taken_slots = {slot for slot, _ in self.loaded.values()}
        return [slot for slot in range(self._num_slots) if slot not in taken_slots]

    def _compute_shape(self, name: str, rank: int) -> tuple[int, ...] | None:
        """Returns the shape, over all layers, of the A or B of an adapter of a rank;
        None: no slot has it."""
        spec = self._specs.get(name)
        if spec is None:
            return None
        # A: [layers, *inputs, rank]; B: [layers, rank, *outputs].
        is_a = name.endswith("lora_a")
        rank_dim = len(spec.shape) - 1 if is_a else spec.num_layer_axes
        shape = [*spec.shape]
        shape[rank_dim] = rank
        return tuple(shape)

    def _write(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        """Overwrites a slot; what ``arrays`` do not have becomes 0."""
        start = np.int32(slot * self._rank)
        for name, layers in self.arrays.items():
            is_a = name.endswith("lora_a")
            padded_shape = self._compute_shape(name, self._rank)
            assert padded_shape is not None
            # Padded with zeros to the largest rank.
            padded = np.zeros(padded_shape, np.float32)
            array = arrays.get(name)
            if array is not None:
                corner = tuple(slice(size) for size in array.shape)
                padded[corner] = array if is_a else array * scale
            layer_shape = padded.shape[self._specs[name].num_layer_axes :]
            columns_by_layer = padded.reshape(-1, *layer_shape)
            # The axis of slots · rank: A's last, B's first.
            dim = len(layer_shape) - 1 if is_a else 0
            layers[:] = [
                write_columns(stacked, columns, start, dim)
                for stacked, columns in zip(layers, columns_by_layer, strict=True)
            ]


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def write_columns(
    stacked: jax.Array, columns: jax.Array, start: jax.Array, dim: int
) -> jax.Array:
    """Writes a layer's A or B into its slot's columns, from ``start`` on."""
    columns = columns.astype(stacked.dtype)
    columns = reshard(columns, jax.typeof(stacked).sharding.spec)
    return lax.dynamic_update_slice_in_dim(stacked, columns, start, dim)
