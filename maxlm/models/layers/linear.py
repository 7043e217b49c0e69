"""The one linear map every other layer is made of."""

from typing import Any

import jax
from flax import nnx
from jax import lax

from maxlm.models.params import compute_view, declare, truncated_normal
from maxlm.sharding import AxisRules


class Linear(nnx.Module):
    """``y = x · kernel + bias`` over named axes, e.g. embed → (heads, head_dim).

    Args:
        inputs, outputs: logical axis → size, in order; the kernel's shape is their concatenation.
        std: standard deviation of the truncated normal initialiser.
        role: "matrix" for hidden layers, "table" for an output head.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool,
        std: float,
        rules: AxisRules,
        dtype: Any,
        role: Any = "matrix",
    ):
        self.rules, self.dtype = rules, dtype
        self.num_inputs, self.out_axes = len(inputs), tuple(outputs)
        self.kernel = declare(
            (*inputs.values(), *outputs.values()),
            (*inputs, *outputs),
            truncated_normal(std),
            role,
            contract=tuple(range(len(inputs))),
        )
        if bias:
            self.bias = declare(
                tuple(outputs.values()), tuple(outputs), jax.nn.initializers.zeros, "vector"
            )
        else:
            self.bias = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, S, *inputs] → [B, S, *outputs] in the compute dtype."""
        kernel = compute_view(self.kernel, self.rules, self.dtype)
        contracted = tuple(range(x.ndim - self.num_inputs, x.ndim))
        y = lax.dot_general(
            x.astype(self.dtype),
            kernel,
            ((contracted, tuple(range(self.num_inputs))), ((), ())),
            out_sharding=self.rules.spec("batch", "seq", *self.out_axes),
        )
        return y if self.bias is None else y + compute_view(self.bias, self.rules, self.dtype)


def residual_std(std: float, num_layers: int) -> float:
    """GPT-2's scaling of maps that write into the residual stream (Radford et al. 2019, §2.3)."""
    return std * (2 * num_layers) ** -0.5
