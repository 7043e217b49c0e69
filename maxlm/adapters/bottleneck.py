"""Bottleneck adapters: a narrow network behind a layer's branch, with a skip
connection."""

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
from pydantic import Field

from maxlm.adapters.targets import (
    declare_input_map,
    declare_output_map,
    declare_vector,
)
from maxlm.config import MaxlmError
from maxlm.models.adapters import Adapter
from maxlm.models.layers.mlp import ACTIVATIONS, Activation
from maxlm.models.params import (
    AdaptedParam,
    ParamReader,
    Params,
    ParamSpec,
    StoredParam,
    flatten_names,
    select_dense_specs,
    truncated_normal,
)
from maxlm.models.targets import replace_targets


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BottleneckParam(AdaptedParam):
    """A map with ``y + act(y · down + down_bias) · up + up_bias`` behind its output y,
    of one dimension (Houlsby et al. 2019, arXiv 1902.00751, §2.1)."""

    adapter_down: StoredParam
    """[..., outputs, width]."""
    adapter_down_bias: StoredParam
    adapter_up: StoredParam
    """[..., width, outputs]."""
    adapter_up_bias: StoredParam
    activation: Activation = field(metadata={"static": True})

    def finish_output(self, y: jax.Array, reader: ParamReader) -> jax.Array:
        (axis,) = reader.output_axes

        def apply_map(
            x: jax.Array,
            kernel: StoredParam,
            bias: StoredParam,
            in_axis: str | None,
            out_axis: str | None,
        ) -> jax.Array:
            (product,) = reader.multiply(x, reader.read(kernel, (in_axis, out_axis)))
            return product + reader.read(bias, (out_axis,)).move()

        hidden = apply_map(y, self.adapter_down, self.adapter_down_bias, axis, None)
        hidden = ACTIVATIONS[self.activation](hidden)
        return y + apply_map(hidden, self.adapter_up, self.adapter_up_bias, None, axis)


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
        dense_specs = flatten_names(select_dense_specs(specs))
        if any("expert" in spec.axes for spec in dense_specs.values()):
            raise MaxlmError(
                "no bottleneck adapter stands behind routed experts",
                where="adapter.kind",
                fix="use lora",
            )
        # Last maps of attention and of the feed-forward.
        targets = ("out", "down") if self.placement == "houlsby" else ("down",)
        return replace_targets(
            specs, targets, self._adapt_one, setting="adapter.targets"
        )

    def _adapt_one(
        self, name: str, spec: ParamSpec, stored: StoredParam
    ) -> BottleneckParam:
        zeros = jax.nn.initializers.zeros
        up_bias = declare_vector(spec, zeros)
        num_layer_dims = len(up_bias.shape) - 1
        size = up_bias.shape[-1]
        # A map from outputs to outputs, of which both maps here are a side.
        square = replace(
            spec,
            shape=(*up_bias.shape, size),
            axes=(*up_bias.axes, up_bias.axes[-1]),
            contracting_dims=(num_layer_dims,),
        )
        width = max(1, size // self.reduction_factor)
        # `up` begins with zeros: the first step is the base's.
        down = declare_input_map(square, width, truncated_normal(0.02))
        up = declare_output_map(square, width, zeros)
        return BottleneckParam(
            stored,
            adapter_down=down,
            adapter_down_bias=declare_vector(down, zeros),
            adapter_up=up,
            adapter_up_bias=up_bias,
            activation="silu" if self.placement == "houlsby" else "relu",
        )
