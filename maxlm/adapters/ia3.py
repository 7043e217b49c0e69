"""IA3 (Liu et al. 2022, arXiv 2205.05638, §3.3): factors on keys, values and hidden
layers."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from maxlm.adapters.targets import declare_vector
from maxlm.models.adapters import Adapter
from maxlm.models.params import (
    AdaptedParam,
    Leaf,
    ParamReader,
    Params,
    ParamSpec,
    ShardedWeight,
    StoredParam,
)
from maxlm.models.targets import replace_targets, split_dims


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ia3Param(AdaptedParam):
    """A map whose inputs, or whose outputs with their bias, are multiplied by
    factors."""

    ia3: StoredParam
    """[..., *inputs] or [..., *outputs]."""
    of_inputs: bool = field(metadata={"static": True})
    num_scaled_dims: int = field(metadata={"static": True})
    """Dimensions of one layer's inputs or outputs."""

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        weight = reader.read(self.base)
        factors = reader.read(self.ia3, self._axes(reader)).value
        scaled = weight.value * self._expand(factors, weight.value)
        return weight._replace(value=scaled)

    def prepare_input(self, x: jax.Array, reader: ParamReader) -> jax.Array:
        return x * self._read_factors(reader) if self.of_inputs else x

    def finish_output(self, y: jax.Array, reader: ParamReader) -> jax.Array:
        return y if self.of_inputs else y * self._read_factors(reader)

    def merge(self) -> jax.Array | None:
        if isinstance(self.base, Leaf):
            return None
        return self.base * self._expand(self.ia3, self.base)

    def merge_bias(self, bias: jax.Array) -> jax.Array:
        return bias if self.of_inputs else bias * self.ia3

    def _axes(self, reader: ParamReader) -> tuple[str | None, ...]:
        return reader.input_axes if self.of_inputs else reader.output_axes

    def _read_factors(self, reader: ParamReader) -> jax.Array:
        return reader.read(self.ia3, self._axes(reader)).move()

    def _expand(self, factors: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns factors with dimensions of size 1 for those of the kernel that they
        do not scale: its last ones, or those before its outputs."""
        first = factors.ndim
        if not self.of_inputs:
            first -= self.num_scaled_dims
        num_added = kernel.ndim - factors.ndim
        return jnp.expand_dims(factors, tuple(range(first, first + num_added)))


class Ia3Adapter(Adapter):
    """Factors on the outputs of some maps, and on the inputs of others."""

    kind: Literal["ia3"] = "ia3"
    targets: tuple[str, ...] = ("key", "value")
    """Maps whose outputs are scaled; names as those of `adapter.targets` of kind
    lora."""
    input_targets: tuple[str, ...] = ("down",)
    """Maps whose inputs are scaled: PEFT's `feedforward_modules`."""

    def adapt(self, specs: Params) -> Params:
        scale_outputs = partial(_declare_factors, of_inputs=False)
        scale_inputs = partial(_declare_factors, of_inputs=True)
        specs = replace_targets(
            specs, self.targets, scale_outputs, setting="adapter.targets"
        )
        return replace_targets(
            specs, self.input_targets, scale_inputs, setting="adapter.input_targets"
        )


def _declare_factors(
    name: str, spec: ParamSpec, stored: StoredParam, *, of_inputs: bool
) -> Ia3Param:
    input_start, output_start = split_dims(spec)
    ones = jax.nn.initializers.ones
    factors = declare_vector(spec, ones, of_inputs=of_inputs)
    if of_inputs:
        num_scaled_dims = output_start - input_start
    else:
        num_scaled_dims = len(spec.shape) - output_start
    return Ia3Param(stored, factors, of_inputs, num_scaled_dims)
