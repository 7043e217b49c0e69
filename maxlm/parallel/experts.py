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

The routing weight is multiplied in before the down-projection, at the expert. Its
gradient is then known from hidden activations alone, so the backward pass needs neither
the experts' outputs nor their way back: under rematerialisation neither is computed
again.

Receive buffers hold the worst case, so that hidden activations would be by far the
largest arrays of a step. They are made for a part of F at a time, never kept, and made
again in the backward pass whatever the remat policy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

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

# Of one hidden activation at a time; a layer has two or three, and as many gradients.
HIDDEN_BYTES = 1 << 30

Kernels = dict[str, jax.Array]


def apply_experts(
    x: jax.Array,
    routing_weights: jax.Array,
    expert_ids: jax.Array,
    kernels: Kernels,
    *,
    activation: Callable[[jax.Array], jax.Array],
    kernel_layouts: dict[str, Dims],
    expert_capacity: int | None = None,
) -> jax.Array:
    """Computes ``y[t] = Σ_j routing_weights[t, j] · down_e(hidden_e(x[t]))``, e =
    expert_ids[t, j], where hidden is ``activation(gate(x)) * up(x)``, or
    ``activation(up(x))`` without a gate.

    Args:
        x: [B, S, D] in the compute dtype, B and S split in any way, D whole.
        routing_weights: fp32 [B, S, k].
        expert_ids: int32 [B, S, k], distinct for a token; E sends an assignment
            nowhere.
        kernels: ``up`` and perhaps ``gate`` [E, D, F], ``down`` [E, F, D], in their
            storage layouts; gradients come back in the same, and in their dtype.
        activation: element-wise; a module-level function, lest each trace compile anew.
        kernel_layouts: the mesh axes of each kernel's dimensions in use, which begin
            those in storage: E over axes that also split tokens, or none; D whole; F
            over any.
        expert_capacity: assignments that each expert serves of each sequence; others
            are dropped. None: all are served, in buffers for the worst case
            (``dispatch.DroplessDispatch``).

    Returns:
        [B, S, D] in x's dtype and layout; differentiable in x, the weights and kernels,
        reverse mode.
    """
    how = _Layouts(x, kernels, kernel_layouts, activation, expert_capacity)
    lies = make_spec((*how.tokens[:2], ()))
    return _experts(
        x, reshard(routing_weights, lies), reshard(expert_ids, lies), kernels, how
    )


def supports_ragged_all_to_all() -> bool:
    """Returns whether programs for the current mesh may use XLA's ragged all-to-all,
    which CPUs lack and v5e's compiler refuses.

    Read from the mesh, not from the default backend: a program for a TPU may be traced
    on a CPU host. Without devices, as on a CPU.
    """
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return not (
        device is None
        or device.platform == "cpu"
        or device.device_kind == "TPU v5 lite"
    )


class _Layouts:
    """Everything static. Compared by identity: it lives as long as one trace."""

    def __init__(
        self,
        x: jax.Array,
        kernels: Kernels,
        used: dict[str, Dims],
        activation: Callable[[jax.Array], jax.Array],
        room: int | None,
    ):
        self.used, self.activation, self.room = used, activation, room
        self.expert_axes, _, self.f_axes = used["up"]
        self.tokens = get_layout(x)
        # Tokens that share F's axes are gathered over them: each device computes its
        # part of F.
        self.whole = tuple(
            tuple(a for a in axes if a not in self.f_axes) for axes in self.tokens
        )
        self.spread = self.whole[0] + self.whole[1]
        """Axes that rows differ along."""
        self.residual_spec = make_spec((self.spread,))
        self.stored = {name: get_layout(kernel) for name, kernel in kernels.items()}
        self.kernel_specs = {
            name: make_spec(dims) for name, dims in self.stored.items()
        }
        self.ragged = supports_ragged_all_to_all()


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _experts(x, weights, chosen, kernels, how):
    return _run(x, weights, chosen, kernels, how)[0]


def _run(x, weights, chosen, kernels, how: _Layouts):
    num_experts = kernels["up"].shape[0]
    tokens = make_spec(how.tokens)

    def program(x, weights, chosen, kernels, here):
        x, weights, chosen = (
            gather(a, how.tokens, how.whole) for a in (x, weights, chosen)
        )
        kernels = _gathered(kernels, x.dtype, how)
        plan: DispatchPlan
        if how.room is None:
            plan = plan_dropless(
                chosen, num_experts, how.expert_axes, here, ragged=how.ragged
            )
        else:
            plan = plan_capacity(chosen, num_experts, how.room, how.expert_axes)
        rows = plan.send_to_experts(
            _to_slots(x.reshape(-1, x.shape[-1]), plan, chosen.shape[-1])
        )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scale = plan.send_to_experts(_to_slots(weights.reshape(-1, 1), plan, 1))

        def add(out, own: Kernels):
            weighted = _weighted(_hidden(plan, rows, own), scale, how.activation)
            return out + plan.dot(weighted, own["down"]), None

        out, _ = _over_parts(add, jnp.zeros(rows.shape, wide), kernels, len(rows))
        out = out.astype(rows.dtype)
        y = (
            _from_slots(plan.receive_from_experts(out), plan)
            .astype(x.dtype)
            .reshape(x.shape)
        )
        y = reduce(y, how.f_axes, how.whole, how.tokens)
        return y, (rows, scale, plan)

    y, saved = map_shards(
        program,
        in_specs=(
            tokens,
            tokens,
            tokens,
            how.kernel_specs,
            make_spec((how.expert_axes,)),
        ),
        out_specs=(tokens, how.residual_spec),
    )(x, weights, chosen, kernels, axis_indices(how.expert_axes))
    return y, (saved, kernels)


def _backward(how: _Layouts, residuals, d_y):
    saved, kernels = residuals
    tokens = make_spec(how.tokens)

    def program(d_y, saved, masters):
        rows, scale, plan = saved
        d_y = gather(d_y, how.tokens, how.whole)
        shape = d_y.shape
        k = plan.assignment_slots.shape[1]
        kernels = _gathered(masters, rows.dtype, how)
        d_out = plan.send_to_experts(_to_slots(d_y.reshape(-1, shape[-1]), plan, k))

        def add(sums, own: Kernels):
            d_rows, d_scale = sums
            weigh = partial(_weighted, activation=how.activation)
            weighted, transpose = jax.vjp(weigh, _hidden(plan, rows, own), scale)
            d_hidden, d_own_scale = transpose(
                plan.dot(d_out, own["down"], transposed=True)
            )
            grads = {name: plan.outer_product(rows, d) for name, d in d_hidden.items()}
            grads["down"] = plan.outer_product(weighted, d_out)
            for name, d in d_hidden.items():
                d_rows += plan.dot(d, own[name], transposed=True)
            return (d_rows, d_scale + d_own_scale), grads

        wide = jnp.promote_types(rows.dtype, jnp.float32)
        zeros = jnp.zeros(rows.shape, wide), jnp.zeros_like(scale)
        (d_rows, d_scale), grads = _over_parts(add, zeros, kernels, len(rows))
        assert grads is not None
        d_rows = d_rows.astype(rows.dtype)
        d_x = (
            _from_slots(plan.receive_from_experts(d_rows), plan)
            .astype(rows.dtype)
            .reshape(shape)
        )
        d_scale = plan.receive_from_experts(d_scale)[:, 0]
        d_weights = _taken(d_scale, plan.assignment_slots).reshape(*shape[:2], k)
        d_x, d_weights = (
            reduce(d, how.f_axes, how.whole, how.tokens) for d in (d_x, d_weights)
        )
        partials = tuple(a for a in how.spread if a not in how.expert_axes)
        # Reduced in the compute dtype, as the gradients of all other weights are.
        d_kernels = {
            name: reduce(
                grads[name], partials, how.used[name], how.stored[name]
            ).astype(m.dtype)
            for name, m in masters.items()
        }
        return d_x, d_weights, d_kernels

    d_x, d_weights, grads = map_shards(
        program,
        in_specs=(tokens, how.residual_spec, how.kernel_specs),
        out_specs=(tokens, tokens, how.kernel_specs),
    )(d_y, saved, kernels)
    return d_x, d_weights, None, grads


_experts.defvjp(_run, _backward)


def _gathered(kernels: Kernels, dtype: Any, how: _Layouts) -> Kernels:
    return {
        name: gather(kernel.astype(dtype), how.stored[name], how.used[name])
        for name, kernel in kernels.items()
    }


def _hidden(plan: DispatchPlan, rows: jax.Array, kernels: Kernels) -> Kernels:
    return {name: plan.dot(rows, kernels[name]) for name in kernels if name != "down"}


def _over_parts(
    body: Callable[[Any, Kernels], tuple[Any, Kernels | None]],
    carry: Any,
    kernels: Kernels,
    num_rows: int,
) -> tuple[Any, Kernels | None]:
    """``body(carry, kernels) -> (carry, arrays like the kernels)`` for a part of F at a
    time."""
    width = kernels["up"].shape[2]
    size = num_rows * width * kernels["up"].dtype.itemsize
    fitting = (
        n for n in range(1, width) if width % n == 0 and size // n <= HIDDEN_BYTES
    )
    parts = next(fitting, width)
    if parts == 1:
        return body(carry, kernels)
    dims = {name: 1 if name == "down" else 2 for name in kernels}

    def step(carry, at):
        own = {
            name: lax.dynamic_slice_in_dim(kernel, at, width // parts, dims[name])
            for name, kernel in kernels.items()
        }
        return body(carry, own)

    carry, out = lax.scan(step, carry, jnp.arange(parts) * (width // parts))
    if out is None:
        return carry, None
    # [parts, E, ...] → the parts side by side in F.
    whole = {
        name: jnp.moveaxis(o, 0, dims[name]).reshape(kernels[name].shape)
        for name, o in out.items()
    }
    return carry, whole


def _weighted(
    hidden: Kernels, scale: jax.Array, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Hidden activations [R, F] times their rows' routing weights fp32 [R, 1]."""
    up = hidden["up"]
    product = activation(hidden["gate"]) * up if "gate" in hidden else activation(up)
    return (product * scale).astype(up.dtype)


def _to_slots(values: jax.Array, plan: DispatchPlan, k: int) -> jax.Array:
    """[T, ...], each for the k assignments of a token → one for each slot, zeros in
    empty ones."""
    return _taken(values, plan.slot_assignments // k)


def _from_slots(slots: jax.Array, plan: DispatchPlan) -> jax.Array:
    """The sum over a token's assignments, [T, D] in fp32 or wider; those dropped add
    nothing."""
    wide = jnp.promote_types(slots.dtype, jnp.float32)
    return jnp.sum(_taken(slots, plan.assignment_slots), axis=1, dtype=wide)


def _taken(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(values, index, axis=0, mode="fill", fill_value=0)
