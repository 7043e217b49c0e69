"""IA3 (Liu et al. 2022, arXiv 2205.05638, §3.3): factors on keys, values and hidden
layers."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from maxlm.adapters.targets import declare_vector, replace_targets, split_dims
from maxlm.models.adapters import Adapter
from maxlm.models.params import (
    AdaptedParam,
    Leaf,
    ParamReader,
    Params,
    ParamSpec,
    ShardedWeight,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ia3Param(AdaptedParam):
    """A map whose inputs, or whose outputs with their bias, are multiplied by
    factors."""

    ia3: Any
    """[..., *inputs] or [..., *outputs]."""
    of_inputs: bool = field(metadata={"static": True})
    num_scaled_dims: int = field(metadata={"static": True})
    """Dimensions of one layer's inputs or outputs."""

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        own = reader.read(self.base)
        factors = reader.read(self.ia3, self._axes(reader)).value
        return own._replace(value=own.value * self._expand(factors, own.value))

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
        at = factors.ndim if self.of_inputs else factors.ndim - self.num_scaled_dims
        return jnp.expand_dims(
            factors, tuple(range(at, at + kernel.ndim - factors.ndim))
        )


class Ia3Adapter(Adapter):
    """Factors on the outputs of some maps, and on the inputs of others."""

    kind: Literal["ia3"] = "ia3"
    targets: tuple[str, ...] = ("key", "value")
    """Maps whose outputs are scaled; names as those of `adapter.targets` of kind
    lora."""
    input_targets: tuple[str, ...] = ("down",)
    """Maps whose inputs are scaled: PEFT's `feedforward_modules`."""

    def adapt(self, specs: Params) -> Params:
        def scale(name: str, spec: ParamSpec, of_inputs: bool) -> Ia3Param:
            lead, end = split_dims(spec)
            vector = declare_vector(spec, jax.nn.initializers.ones, of_inputs=of_inputs)
            num_dims = end - lead if of_inputs else len(spec.shape) - end
            return Ia3Param(spec, vector, of_inputs, num_dims)

        specs = replace_targets(specs, self.targets, partial(scale, of_inputs=False))
        return replace_targets(
            specs, self.input_targets, partial(scale, of_inputs=True)
        )
