"""Optimizers: gradients in, parameter updates out, as one optax transformation.

Every kind of optimizer is the same chain: clip by global norm, turn gradients into a
direction, add decoupled weight decay where it belongs, multiply by the learning rate.
Only the direction differs.
"""

from typing import Any

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
    inner = _make_gradient_chain(config, schedule, specs)
    if any(spec.sign_update for spec in jax.tree.leaves(specs)):
        learned = jax.tree.map(
            lambda spec: optax.MaskedNode() if spec.sign_update else spec, specs
        )
        labels = jax.tree.map(
            lambda spec: "rule" if spec.sign_update else "gradient", specs
        )
        by_gradient = _make_gradient_chain(config, schedule, learned)
        by_rule = _make_sign_rule(config.rule_step)
        inner = optax.partition({"gradient": by_gradient, "rule": by_rule}, labels)

    def init(params: Any) -> optax.OptState:
        trained, _ = split_params(params, specs)
        return inner.init(trained)

    return optax.GradientTransformation(init, inner.update)


def _make_gradient_chain(
    config: OptimizerConfig, schedule: optax.Schedule, specs: Params
) -> optax.GradientTransformation:
    """Makes the chain of parameters that learn by their gradient."""
    clip = optax.identity()
    if config.clip_norm:
        clip = optax.clip_by_global_norm(config.clip_norm)
    # Norm scales, biases and sinks are vectors, and never decay.
    decayed = jax.tree.map(lambda spec: spec.role != "vector", specs)
    return optax.chain(
        clip,
        OPTIMIZERS.get(config.kind).make_direction(config, specs),
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

    def move(tree: Any, rules: AxisRules) -> Any:
        return jax.tree.map(
            lambda spec, x: gather_to_spec(x, rules.spec(*spec.axes)), specs, tree
        )

    def update(updates, state, params=None):
        if params is not None:
            params = move(params, optimizer_rules)
        updates = move(updates, optimizer_rules)
        updates, state = inner.update(updates, state, params)
        return move(updates, storage_rules), state

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
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
    owners = flatten_names(specs)

    def describe(path: tuple, leaf: jax.ShapeDtypeStruct) -> ParamSpec:
        # A moment's path ends with its parameter's: of several names the longest.
        name = f".{join_path(path)}"
        endings = [owner for owner in owners if name.endswith(f".{owner}")]
        owner = owners[max(endings, key=len)] if endings else None
        axes = (None,) * len(leaf.shape)
        if owner is not None and len(owner.shape) == len(leaf.shape):
            sizes = zip(owner.axes, leaf.shape, owner.shape, strict=True)
            axes = tuple(axis if n == full else None for axis, n, full in sizes)
        return ParamSpec(
            leaf.shape, axes, jax.nn.initializers.zeros, "vector", dtype=leaf.dtype
        )

    return jax.tree_util.tree_map_with_path(
        describe, jax.eval_shape(optimizer.init, params)
    )
