"""Bottleneck adapters: a narrow network behind a layer's branch, with a skip
connection."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
from pydantic import Field

from maxlm.adapters.targets import (
    declare_input_map,
    declare_output_map,
    declare_vector,
    replace_targets,
)
from maxlm.config import MaxlmError
from maxlm.models.adapters import Adapter
from maxlm.models.layers.mlp import ACTIVATIONS
from maxlm.models.params import (
    AdaptedParam,
    ParamReader,
    Params,
    ParamSpec,
    flatten_names,
    truncated_normal,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BottleneckParam(AdaptedParam):
    """A map with ``y + act(y · down + down_bias) · up + up_bias`` behind its output y,
    of one dimension (Houlsby et al. 2019, arXiv 1902.00751, §2.1)."""

    adapter_down: Any
    """[..., outputs, width]."""
    adapter_down_bias: Any
    adapter_up: Any
    """[..., width, outputs]."""
    adapter_up_bias: Any
    activation: str = field(metadata={"static": True})

    def finish_output(self, y: jax.Array, reader: ParamReader) -> jax.Array:
        (axis,) = reader.output_axes

        def apply(x: jax.Array, kernel: Any, bias: Any, *axes: str | None) -> jax.Array:
            (product,) = reader.multiply(x, reader.read(kernel, axes))
            return product + reader.read(bias, axes[1:]).move()

        h = apply(y, self.adapter_down, self.adapter_down_bias, axis, None)
        h = ACTIVATIONS[self.activation](h)
        return y + apply(h, self.adapter_up, self.adapter_up_bias, None, axis)


class BottleneckAdapter(Adapter):
    """Bottleneck adapters behind layers' branches; they cannot be merged."""

    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: behind attention, with swish, and behind the feed-forward. pfeiffer
    (Pfeiffer et al. 2020, arXiv 2005.00247): behind the feed-forward alone, with
    ReLU."""
    reduction_factor: int = Field(default=16, gt=0)
    """Their width is d_model / this."""

    def adapt(self, specs: Params) -> Params:
        if any("expert" in spec.axes for spec in flatten_names(specs).values()):
            what = "no bottleneck adapter stands behind routed experts"
            raise MaxlmError(what, where="adapter.kind", fix="use lora")
        both = self.placement == "houlsby"
        return replace_targets(
            specs, ("out", "down") if both else ("down",), self._adapt_one
        )

    def _adapt_one(self, name: str, spec: ParamSpec) -> BottleneckParam:
        zeros = jax.nn.initializers.zeros
        offset = declare_vector(spec, zeros)
        lead = len(offset.shape) - 1
        size = offset.shape[-1]
        shape, axes = (*offset.shape, size), (*offset.axes, offset.axes[-1])
        square = replace(spec, shape=shape, axes=axes, contracting_dims=(lead,))
        width = max(1, size // self.reduction_factor)
        down = declare_input_map(square, width, truncated_normal(0.02))
        up = declare_output_map(square, width, zeros)
        activation = "silu" if self.placement == "houlsby" else "relu"
        return BottleneckParam(
            spec, down, declare_vector(down, zeros), up, offset, activation
        )
