"""The one linear map every other layer is made of."""

from functools import partial
from math import prod
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

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
        layout = self.rules.spec("batch", "seq", *self.out_axes)
        y: Any = _project(x.astype(self.dtype), kernel, self.num_inputs, layout)
        return y if self.bias is None else y + compute_view(self.bias, self.rules, self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _project(x: jax.Array, kernel: jax.Array, num_inputs: int, layout: PartitionSpec) -> jax.Array:
    """x [B, S, *inputs] · kernel [*inputs, *outputs] → [B, S, *outputs] in ``layout``.

    The kernel's gradient is xᵀ·dy or (dyᵀ·x)ᵀ: whichever turns the smaller of the two around, on
    each device. JAX's own rule always turns dy, which on a CPU is slow where dy is the wide hidden
    layer of an MLP (docs/performance.md). Reverse mode only.
    """
    inputs = tuple(range(num_inputs))
    last = tuple(range(x.ndim - num_inputs, x.ndim))
    return lax.dot_general(x, kernel, ((last, inputs), ((), ())), out_sharding=layout)


def _project_forward(x, kernel, num_inputs, layout):
    return _project(x, kernel, num_inputs, layout), (x, kernel)


def _project_backward(num_inputs, layout, saved, d_y):
    del layout
    x, kernel = saved
    outputs = tuple(range(num_inputs, kernel.ndim))
    last = tuple(range(2, d_y.ndim))
    # A cotangent lies as its primal does.
    x_layout, kernel_layout = (jax.typeof(a).sharding.spec for a in (x, kernel))
    d_x = lax.dot_general(d_y, kernel, ((last, outputs), ((), ())), out_sharding=x_layout)
    tokens = (((0, 1), (0, 1)), ((), ()))
    if _local_size(x) <= _local_size(d_y):
        return d_x, lax.dot_general(x, d_y, tokens, out_sharding=kernel_layout)
    turned = PartitionSpec(*kernel_layout[num_inputs:], *kernel_layout[:num_inputs])
    d_kernel = lax.dot_general(d_y, x, tokens, out_sharding=turned)
    order = (*range(len(outputs), kernel.ndim), *range(len(outputs)))
    return d_x, d_kernel.transpose(order)


def _local_size(x: jax.Array) -> int:
    return prod(jax.typeof(x).sharding.shard_shape(x.shape))


_project.defvjp(_project_forward, _project_backward)


def residual_std(std: float, num_layers: int) -> float:
    """GPT-2's scaling of maps that write into the residual stream (Radford et al. 2019, §2.3)."""
    return std * (2 * num_layers) ** -0.5
