"""The experts of a mixture-of-experts layer, on tokens and weights split over devices.

One program on shards forward, one backward. Tokens go to the devices that hold their
experts and come back (:mod:`maxlm.parallel.dispatch`); in between each row meets one
expert's feed-forward layer. What crosses the wire, with every mesh axis of size 1 left
out:

    forward     weights: all-gather of what storage splits and compute does not (fsdp)
                tokens split over `tensor` in seq: all-gather over it
                rows, routing weights: there and back over `expert`
                outputs, partial over `tensor`: reduce-scatter into seq, or all-reduce
    backward    the same for cotangents, and weight gradients by reduce-scatter over fsdp,
                all-reduce over data and context

The routing weight is multiplied in before the down-projection, at the expert (or into
the expert's input, where that is what weighs). Its gradient is then known from hidden
activations alone, so the backward pass needs neither the experts' outputs nor their way
back: under rematerialisation neither is computed again. An output's offset is weighted
beside; where F is split, the first device of its axes alone adds it.

Receive buffers hold the worst case, so that hidden activations would be by far the
largest arrays of a step. They are made for a part of F at a time, never kept, and made
again in the backward pass whatever the remat policy.

Letters: B batch, S sequence, D width of tokens, E experts, F width of an expert, k
experts of a token; T = B·S tokens of a device, R rows at the experts.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard
from jax.typing import DTypeLike

from maxlm.parallel.dispatch import DispatchPlan, plan_capacity, plan_dropless
from maxlm.parallel.local import (
    Dims,
    axis_indices,
    gather,
    get_layout,
    make_spec,
    map_shards,
    reduce,
)
from pallas_kernels.chips import get_mesh_device

# Of one hidden activation at a time; a layer has two or three, and as many gradients.
HIDDEN_BYTES = 1 << 30

Kernels = dict[str, jax.Array]
"""``up`` and perhaps ``gate`` [E, D, F], ``down`` [E, F, D], and perhaps offsets of their
outputs, ``up_bias`` and ``gate_bias`` [E, F], ``down_bias`` [E, D]; or what is as
large."""
HiddenFunction = Callable[..., jax.Array]
"""``(up) -> hidden`` or ``(up, gate) -> hidden``, element-wise."""
F_DIMS = {"gate": 2, "up": 2, "down": 1, "gate_bias": 1, "up_bias": 1}
"""The dimension F of each array that has it."""
T = TypeVar("T")


def apply_experts(
    x: jax.Array,
    routing_weights: jax.Array,
    expert_ids: jax.Array,
    kernels: Kernels,
    *,
    activation: HiddenFunction,
    kernel_layouts: dict[str, Dims],
    expert_capacity: int | None = None,
    weigh_inputs: bool = False,
) -> jax.Array:
    """Computes ``y[t] = Σ_j routing_weights[t, j] · down_e(hidden_e(x[t]))``, e =
    expert_ids[t, j], where hidden is ``activation(up(x), gate(x))``, or
    ``activation(up(x))`` without a gate.

    Args:
        x: [B, S, D] in the compute dtype, B and S split in any way, D whole.
        routing_weights: fp32 [B, S, k].
        expert_ids: int32 [B, S, k], distinct for a token; E sends an assignment
            nowhere.
        kernels: ``up`` and perhaps ``gate`` [E, D, F], ``down`` [E, F, D], and offsets
            (:data:`Kernels`), in their storage layouts; gradients come back in the
            same, and in their dtype.
        activation: element-wise.
        kernel_layouts: the mesh axes of each kernel's dimensions in use, which begin
            those in storage: E over axes that also split tokens, or none; D whole; F
            over any.
        expert_capacity: assignments that each expert serves of each sequence; others
            are dropped. None: all are served, in buffers for the worst case
            (``dispatch.DroplessDispatch``).
        weigh_inputs: ``y[t] = Σ_j down_e(hidden_e(routing_weights[t, j] · x[t]))``.

    Returns:
        [B, S, D] in x's dtype and layout; differentiable in x, the weights and kernels,
        reverse mode.
    """
    settings = _Settings(
        x, kernels, kernel_layouts, activation, expert_capacity, weigh_inputs
    )
    token_spec = make_spec((*settings.tokens[:2], ()))
    routing_weights = reshard(routing_weights, token_spec)
    expert_ids = reshard(expert_ids, token_spec)
    return _experts(x, routing_weights, expert_ids, kernels, settings)


def supports_ragged_all_to_all() -> bool:
    """Returns whether programs for the current mesh may use XLA's ragged all-to-all,
    which CPUs lack and v5e's compiler refuses.

    Read from the mesh, not from the default backend: a program for a TPU may be traced
    on a CPU host. Without devices, as on a CPU.
    """
    device = get_mesh_device()
    if device is None or device.platform == "cpu":
        return False
    return device.device_kind != "TPU v5 lite"


class _Settings:
    """Everything static. Compared by identity: it lives as long as one trace."""

    def __init__(
        self,
        x: jax.Array,
        kernels: Kernels,
        kernel_layouts: dict[str, Dims],
        activation: HiddenFunction,
        expert_capacity: int | None,
        weigh_inputs: bool,
    ):
        self.kernel_layouts = kernel_layouts
        self.activation = activation
        self.expert_capacity = expert_capacity
        self.weigh_inputs = weigh_inputs
        self.expert_axes, _, self.f_axes = kernel_layouts["up"]
        self.tokens = get_layout(x)
        # Tokens that share F's axes are gathered over them: each device computes its
        # part of F.
        self.gathered_tokens = tuple(
            tuple(axis for axis in axes if axis not in self.f_axes)
            for axes in self.tokens
        )
        self.row_axes = self.gathered_tokens[0] + self.gathered_tokens[1]
        """Axes that rows differ along."""
        self.token_spec = make_spec(self.tokens)
        self.residual_spec = make_spec((self.row_axes,))
        self.stored_layouts = {
            name: get_layout(kernel) for name, kernel in kernels.items()
        }
        self.kernel_specs = {
            name: make_spec(dims) for name, dims in self.stored_layouts.items()
        }
        self.expert_index_spec = make_spec((self.expert_axes,))
        self.f_index_spec = make_spec((self.f_axes,))
        self.ragged = supports_ragged_all_to_all()

    def gather_tokens(self, x: jax.Array) -> jax.Array:
        """Gathers tokens, on shards, to all devices that have a part of F for them."""
        return gather(x, self.tokens, self.gathered_tokens)

    def reduce_tokens(self, y: jax.Array) -> jax.Array:
        """Sums, on shards, what the devices' parts of F gave; inverts
        :meth:`gather_tokens`."""
        return reduce(y, self.f_axes, self.gathered_tokens, self.tokens)

    def gather_kernels(self, kernels: Kernels, dtype: DTypeLike) -> Kernels:
        """Gathers kernels, on shards, from storage to use."""
        return {
            name: gather(
                kernel.astype(dtype),
                self.stored_layouts[name],
                self.kernel_layouts[name],
            )
            for name, kernel in kernels.items()
        }


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass."""

    rows: jax.Array
    """[R, D]: the experts' inputs."""
    scale: jax.Array
    """fp32 [R, 1]: their routing weights."""
    plan: DispatchPlan


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _experts(
    x: jax.Array,
    weights: jax.Array,
    expert_ids: jax.Array,
    kernels: Kernels,
    settings: _Settings,
) -> jax.Array:
    return _forward(x, weights, expert_ids, kernels, settings)[0]


def _forward(x, weights, expert_ids, kernels, settings: _Settings):
    num_experts = kernels["up"].shape[0]

    def run(x, weights, expert_ids, kernels, device_index, f_index):
        x = settings.gather_tokens(x)
        weights = settings.gather_tokens(weights)
        expert_ids = settings.gather_tokens(expert_ids)
        kernels = settings.gather_kernels(kernels, x.dtype)
        plan = _plan(expert_ids, num_experts, device_index, settings)
        slots = _to_slots(x.reshape(-1, x.shape[-1]), plan, expert_ids.shape[-1])
        rows = plan.send_to_experts(slots)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale = plan.send_to_experts(_to_slots(weights.reshape(-1, 1), plan, 1))
        inputs, out_scale = _weigh_rows(rows, scale, settings)

        def add_part(out: jax.Array, part: Kernels) -> tuple[jax.Array, None]:
            hidden = _compute_hidden(plan, inputs, part)
            weighted = _activate(hidden, out_scale, settings.activation)
            return out + plan.dot(weighted, part["down"]), None

        out = jnp.zeros(rows.shape, wide)
        if "down_bias" in kernels:
            # Sums over the parts of F, here and over devices, have it once.
            bias = plan.spread_to_rows(kernels["down_bias"]).astype(wide)
            is_first = f_index[0] == 0
            out = jnp.where(is_first, bias * out_scale, 0.0).astype(wide)
        out, _ = _scan_parts(add_part, out, kernels, len(rows))
        out = out.astype(rows.dtype)
        y = _from_slots(plan.receive_from_experts(out), plan)
        y = y.astype(x.dtype).reshape(x.shape)
        return settings.reduce_tokens(y), _Saved(rows, scale, plan)

    y, saved = map_shards(
        run,
        in_specs=(
            settings.token_spec,
            settings.token_spec,
            settings.token_spec,
            settings.kernel_specs,
            settings.expert_index_spec,
            settings.f_index_spec,
        ),
        out_specs=(settings.token_spec, settings.residual_spec),
    )(
        x,
        weights,
        expert_ids,
        kernels,
        axis_indices(settings.expert_axes),
        axis_indices(settings.f_axes),
    )
    return y, (saved, kernels)


def _backward(settings: _Settings, residuals, d_y):
    saved, kernels = residuals

    def run(d_y, saved: _Saved, stored_kernels: Kernels, f_index: jax.Array):
        rows, scale, plan = saved
        inputs, out_scale = _weigh_rows(rows, scale, settings)
        d_y = settings.gather_tokens(d_y)
        token_shape = d_y.shape[:2]
        d_model = d_y.shape[-1]
        k = plan.assignment_slots.shape[1]
        kernels = settings.gather_kernels(stored_kernels, rows.dtype)
        d_slots = _to_slots(d_y.reshape(-1, d_model), plan, k)
        d_out = plan.send_to_experts(d_slots)

        def add_part(
            sums: tuple[jax.Array, jax.Array], part: Kernels
        ) -> tuple[tuple[jax.Array, jax.Array], Kernels]:
            d_inputs, d_scale = sums
            activate = partial(_activate, activation=settings.activation)
            hidden = _compute_hidden(plan, inputs, part)
            weighted, pull = jax.vjp(activate, hidden, out_scale)
            d_weighted = plan.dot(d_out, part["down"], transposed=True)
            d_hidden, d_part_scale = pull(d_weighted)
            d_kernels = {
                name: plan.outer_product(inputs, d) for name, d in d_hidden.items()
            }
            d_kernels["down"] = plan.outer_product(weighted, d_out)
            for name, d in d_hidden.items():
                d_inputs += plan.dot(d, part[name], transposed=True)
                if f"{name}_bias" in part:
                    d_kernels[f"{name}_bias"] = plan.sum_by_expert(d)
            return (d_inputs, d_scale + d_part_scale), d_kernels

        wide = jnp.promote_types(rows.dtype, jnp.float32)
        zeros = (jnp.zeros(rows.shape, wide), jnp.zeros_like(scale))
        (d_rows, d_scale), d_kernels = _scan_parts(add_part, zeros, kernels, len(rows))
        assert d_kernels is not None
        if "down_bias" in kernels:
            # Equal on all devices of F's axes, as its value is.
            d_bias_rows = (d_out * out_scale).astype(rows.dtype)
            d_kernels["down_bias"] = plan.sum_by_expert(d_bias_rows)
            bias = plan.spread_to_rows(kernels["down_bias"]).astype(wide)
            d_bias_scale = jnp.sum(d_out * bias, axis=1, keepdims=True)
            d_scale += jnp.where(f_index[0] == 0, d_bias_scale, 0.0)
        if settings.weigh_inputs:
            # From the input's gradient; the output's factor was 1.
            d_scale = jnp.sum(d_rows * rows, axis=1, keepdims=True, dtype=scale.dtype)
            d_rows = d_rows * scale
        d_rows = d_rows.astype(rows.dtype)
        d_x = _from_slots(plan.receive_from_experts(d_rows), plan)
        d_x = d_x.astype(rows.dtype).reshape(*token_shape, d_model)
        d_scale = plan.receive_from_experts(d_scale)[:, 0]
        d_weights = _take_or_zero(d_scale, plan.assignment_slots)
        d_weights = d_weights.reshape(*token_shape, k)
        d_x = settings.reduce_tokens(d_x)
        d_weights = settings.reduce_tokens(d_weights)
        # Reduced in the compute dtype, as the gradients of all other weights are.
        summed_axes = tuple(
            axis for axis in settings.row_axes if axis not in settings.expert_axes
        )
        reduced = {}
        for name, stored in stored_kernels.items():
            d_kernel = reduce(
                d_kernels[name],
                summed_axes,
                settings.kernel_layouts[name],
                settings.stored_layouts[name],
            )
            reduced[name] = d_kernel.astype(stored.dtype)
        return d_x, d_weights, reduced

    d_x, d_weights, d_kernels = map_shards(
        run,
        in_specs=(
            settings.token_spec,
            settings.residual_spec,
            settings.kernel_specs,
            settings.f_index_spec,
        ),
        out_specs=(settings.token_spec, settings.token_spec, settings.kernel_specs),
    )(d_y, saved, kernels, axis_indices(settings.f_axes))
    return d_x, d_weights, None, d_kernels


_experts.defvjp(_forward, _backward)


def _plan(
    expert_ids: jax.Array,
    num_experts: int,
    device_index: jax.Array,
    settings: _Settings,
) -> DispatchPlan:
    if settings.expert_capacity is None:
        return plan_dropless(
            expert_ids,
            num_experts,
            settings.expert_axes,
            device_index,
            ragged=settings.ragged,
        )
    return plan_capacity(
        expert_ids, num_experts, settings.expert_capacity, settings.expert_axes
    )


def _weigh_rows(
    rows: jax.Array, scale: jax.Array, settings: _Settings
) -> tuple[jax.Array, jax.Array]:
    """Returns the experts' inputs [R, D], and the factors fp32 [R, 1] of their outputs:
    routing weights are in one of them."""
    if not settings.weigh_inputs:
        return rows, scale
    return (rows * scale).astype(rows.dtype), jnp.ones_like(scale)


def _compute_hidden(plan: DispatchPlan, rows: jax.Array, kernels: Kernels) -> Kernels:
    """Maps rows [R, D] by ``up`` and perhaps ``gate``, to [R, F] each."""
    hidden = {}
    for name in ("gate", "up"):
        if name not in kernels:
            continue
        hidden[name] = plan.dot(rows, kernels[name])
        bias = kernels.get(f"{name}_bias")
        if bias is not None:
            hidden[name] += plan.spread_to_rows(bias)
    return hidden


def _scan_parts(
    body: Callable[[T, Kernels], tuple[T, Kernels | None]],
    carry: T,
    kernels: Kernels,
    num_rows: int,
) -> tuple[T, Kernels | None]:
    """Runs ``body(carry, kernels) -> (carry, arrays like the kernels)`` for a part of F
    at a time, with those kernels that have F."""
    kernels = {name: kernels[name] for name in kernels if name in F_DIMS}
    width = kernels["up"].shape[2]
    hidden_bytes = num_rows * width * kernels["up"].dtype.itemsize
    # The fewest parts that divide F and fit; F of them where none fits.
    fitting = (
        n
        for n in range(1, width)
        if width % n == 0 and hidden_bytes // n <= HIDDEN_BYTES
    )
    num_parts = next(fitting, width)
    if num_parts == 1:
        return body(carry, kernels)
    part_width = width // num_parts

    def step(carry: T, start: jax.Array) -> tuple[T, Kernels | None]:
        part = {
            name: lax.dynamic_slice_in_dim(kernel, start, part_width, F_DIMS[name])
            for name, kernel in kernels.items()
        }
        return body(carry, part)

    starts = jnp.arange(num_parts) * part_width
    carry, stacked = lax.scan(step, carry, starts)
    if stacked is None:
        return carry, None
    # [parts, E, ...] → the parts side by side in F.
    whole = {
        name: jnp.moveaxis(parts, 0, F_DIMS[name]).reshape(kernels[name].shape)
        for name, parts in stacked.items()
    }
    return carry, whole


def _activate(
    hidden: Kernels, scale: jax.Array, activation: HiddenFunction
) -> jax.Array:
    """Returns hidden activations [R, F] times their rows' factors fp32 [R, 1]."""
    up = hidden["up"]
    gate = hidden.get("gate")
    product = activation(up) if gate is None else activation(up, gate)
    return (product * scale).astype(up.dtype)


def _to_slots(values: jax.Array, plan: DispatchPlan, k: int) -> jax.Array:
    """[T, ...], each for the k assignments of a token → one for each slot, zeros in
    empty ones."""
    return _take_or_zero(values, plan.slot_assignments // k)


def _from_slots(slots: jax.Array, plan: DispatchPlan) -> jax.Array:
    """Sums over a token's assignments, [T, D] in fp32 or wider; those dropped add
    nothing."""
    wide = jnp.promote_types(slots.dtype, jnp.float32)
    return jnp.sum(_take_or_zero(slots, plan.assignment_slots), axis=1, dtype=wide)


def _take_or_zero(values: jax.Array, index: jax.Array) -> jax.Array:
    """Takes rows; those past the end are zeros."""
    return jnp.take(values, index, axis=0, mode="fill", fill_value=0)
