"""The state of a run, and how it lies on the mesh."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from maxlm.models.params import Params, init_params
from maxlm.sharding import AxisRules


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes; with other leaves than arrays, their shapes or shardings.

    The data's position is ``step`` itself; so is the randomness's."""

    step: Any
    """int32: steps taken."""
    params: Any
    """fp32 master parameters, a nested dict."""
    opt_state: Any
    ema: Any
    """Exponential moving average of the parameters, or None."""
    frozen: dict[str, Params] = field(default_factory=dict)
    """Parameters of the other models that the task reads, by the task's names for them. They never
    change, and checkpoints say where they came from in their place."""


def init_state(
    specs: Params, optimizer: optax.GradientTransformation, key: jax.Array, *, ema: bool
) -> TrainState:
    """Makes a fresh state. Pure; ``maxlm.sharding.jit_sharded`` creates it in its shards."""
    params = init_params(specs, key)
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), copy)


def remove_frozen(state: TrainState) -> TrainState:
    """Return the part of a state that checkpoints hold."""
    return replace(state, frozen={})


def param_shardings(specs: Params, rules: AxisRules, mesh: Mesh) -> Params:
    """Returns the sharding of every parameter of a placed model (``place_model``)."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, rules.spec(*spec.axes)), specs)
