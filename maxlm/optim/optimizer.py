"""Optimizers: gradients in, parameter updates out, as one optax transformation.

Every kind of optimizer is the same chain: clip by global norm, turn gradients into a
direction, add decoupled weight decay where it belongs, multiply by the learning rate.
Only the direction differs.
"""

from typing import cast

import jax
import jax.numpy as jnp
import optax

from maxlm.models.params import Params, ParamSpec, flatten_names, join_path
from maxlm.optim.config import OPTIMIZERS, OptimizerConfig
from maxlm.optim.state import split_params
from maxlm.parallel.local import gather_to_spec
from maxlm.sharding import AxisRules


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, specs: Params
) -> optax.GradientTransformation:
    """Makes the transformation ``update(grads, state, params) -> (updates, state)``.

    Gradients and parameters are fp32 trees like ``specs`` (of the trained parameters),
    each pair in one layout; updates come out in that layout, to be *added* to the
    parameters. ``init`` takes all of a model's. The state is fp32. Runs on explicit
    meshes, inside or outside jit.
    """
    if any(spec.sign_update for spec in jax.tree.leaves(specs)):
        inner = _make_gradient_and_rule(config, schedule, specs)
    else:
        inner = _make_gradient_chain(config, schedule, specs)

    def init(params: optax.Params) -> optax.OptState:
        trained, _ = split_params(cast(Params, params), specs)
        return inner.init(trained)

    return optax.GradientTransformation(init, inner.update)


def _make_gradient_and_rule(
    config: OptimizerConfig, schedule: optax.Schedule, specs: Params
) -> optax.GradientTransformation:
    """Makes the optimizer of a model in which some parameters learn by a rule
    (``ParamSpec.sign_update``), the others by their gradient."""
    learned_specs = jax.tree.map(
        lambda spec: optax.MaskedNode() if spec.sign_update else spec, specs
    )
    labels = jax.tree.map(
        lambda spec: "rule" if spec.sign_update else "gradient", specs
    )
    by_gradient = _make_gradient_chain(config, schedule, learned_specs)
    by_rule = _make_sign_rule(config.rule_step)
    return optax.partition({"gradient": by_gradient, "rule": by_rule}, labels)


def _make_gradient_chain(
    config: OptimizerConfig, schedule: optax.Schedule, specs: Params
) -> optax.GradientTransformation:
    """Makes the chain of parameters that learn by their gradient."""
    clip = optax.identity()
    if config.clip_norm:
        clip = optax.clip_by_global_norm(config.clip_norm)
    direction = OPTIMIZERS.get(config.kind).make_direction(config, specs)
    # Norm scales, biases and sinks are vectors, and never decay.
    decayed = jax.tree.map(lambda spec: spec.role != "vector", specs)
    return optax.chain(
        clip,
        direction,
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )


def _make_sign_rule(step: float) -> optax.GradientTransformation:
    """Makes the rule of routers' selection biases: a step against the sign of the
    expert's excess load (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

    def update(
        updates: optax.Updates, params: optax.Params | None = None
    ) -> optax.Updates:
        del params
        return jax.tree.map(lambda g: -step * jnp.sign(g), updates)

    return optax.stateless(update)


def shard_optimizer(
    inner: optax.GradientTransformation,
    specs: Params,
    optimizer_rules: AxisRules,
    storage_rules: AxisRules,
) -> optax.GradientTransformation:
    """Makes an optimizer whose state, and so its work, lies by ``optimizer_rules``:
    each device updates its share of every parameter, and the updates are gathered
    (ZeRO-1 and 2)."""
    if optimizer_rules == storage_rules:
        return inner

    def lay_out(tree: optax.Updates, rules: AxisRules) -> optax.Updates:
        return jax.tree.map(
            lambda spec, x: gather_to_spec(x, rules.spec(*spec.axes)), specs, tree
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is not None:
            params = lay_out(params, optimizer_rules)
        updates = lay_out(updates, optimizer_rules)
        updates, state = inner.update(updates, state, params)
        return lay_out(updates, storage_rules), state

    return optax.GradientTransformation(inner.init, update)


def opt_state_specs(
    optimizer: optax.GradientTransformation, specs: Params
) -> optax.OptState:
    """Returns the optimizer's state with a declaration for every array; no device is
    touched.

    An array under a parameter's path has that parameter's axes on every dimension it
    shares with it (moments: all; factored moments: those not reduced to 1). All else is
    whole everywhere.
    """
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs
    )
    state = jax.eval_shape(optimizer.init, params)
    spec_by_name = flatten_names(specs)

    def list_axes(
        path: jax.tree_util.KeyPath, shape: tuple[int, ...]
    ) -> tuple[str | None, ...]:
        # A moment's path ends with its parameter's: of several names the longest.
        path_name = f".{join_path(path)}"
        param_names = [name for name in spec_by_name if path_name.endswith(f".{name}")]
        if not param_names:
            return (None,) * len(shape)
        spec = spec_by_name[max(param_names, key=len)]
        if len(spec.shape) != len(shape):
            return (None,) * len(shape)
        return tuple(
            axis if size == full_size else None
            for axis, size, full_size in zip(spec.axes, shape, spec.shape, strict=True)
        )

    def declare(path: jax.tree_util.KeyPath, array: jax.ShapeDtypeStruct) -> ParamSpec:
        return ParamSpec(
            array.shape,
            list_axes(path, array.shape),
            jax.nn.initializers.zeros,
            "vector",
            dtype=array.dtype,
        )

    return jax.tree_util.tree_map_with_path(declare, state)
