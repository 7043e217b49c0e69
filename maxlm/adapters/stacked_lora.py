"""Several LoRA adapters in one batch, side by side along the rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import reshard

from maxlm.adapters.targets import declare_input_map, declare_output_map, replace_targets
from maxlm.models.params import (
    AdaptedParam,
    ParamReader,
    Params,
    ParamSpec,
    UnstackedParam,
    flatten_names,
    is_leaf,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedLora(AdaptedParam):
    """``x · base + (mask * (x · A)) · B``: of each token the mask leaves the columns of its own
    adapter alone, so that one dense product serves any mix of adapters."""

    lora_a: Any
    """[*inputs, slots · rank]."""
    lora_b: Any
    """[slots · rank, *outputs], multiplied by each adapter's scale."""
    mask: Any
    """[B, S, slots · rank], 0 or 1, the same for all maps."""

    def finish_product(self, y: jax.Array, x: jax.Array, reader: ParamReader) -> jax.Array:
        (h,) = reader.multiply(x, reader.read(self.lora_a, (*reader.input_axes, None)))
        h *= reshard(self.mask, jax.typeof(h).sharding.spec)
        return y + reader.multiply(h, reader.read(self.lora_b, (None, *reader.output_axes)))[0]


def declare_stacked_lora(specs: Params, num_columns: int) -> dict[str, ParamSpec]:
    """Returns declarations of A and B beside all linear maps of layers, by canonical name;
    ``num_columns`` is slots · rank."""
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
    """Returns unstacked parameters with a :class:`StackedLora` in place of each kernel that has A
    and B; ``arrays`` has each layer's, by canonical name."""
    flat = flatten_names(params, is_leaf)
    structure = jax.tree.structure(params, is_leaf=is_leaf)
    for name in {array.rpartition(".")[0] for array in arrays}:
        parts = flat[name].layers, arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]
        layers = tuple(StackedLora(*own, mask) for own in zip(*parts, strict=True))
        flat[name] = UnstackedParam(layers)
    return jax.tree.unflatten(structure, [*flat.values()])
