"""The state of a run, and how it lies on the mesh."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from maxlm.models.params import Params, ParamSpec, init_params, join_path
from maxlm.sharding import AxisRules, resolve_placement
from maxlm.train.optimizer import abstract_opt_state


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


def param_shardings(specs: Params, rules: AxisRules, mesh: Mesh | AbstractMesh) -> Params:
    """Returns the sharding of every parameter; raises MaxlmError for an axis that does not divide,
    or two on one mesh axis."""
    sizes = dict(mesh.shape)

    def sharding(path: tuple, spec: ParamSpec) -> NamedSharding:
        own = resolve_placement(join_path(path), spec.shape, spec.axes, rules, sizes)
        return NamedSharding(mesh, own.spec)

    return jax.tree_util.tree_map_with_path(sharding, specs)


def state_shardings(
    specs: Params,
    optimizer: optax.GradientTransformation,
    rules: AxisRules,
    mesh: Mesh,
    *,
    ema: bool,
    optimizer_rules: AxisRules | None = None,
    frozen: Mapping[str, Params] = MappingProxyType({}),
) -> TrainState:
    """Returns the sharding of every array of a state, as a TrainState of shardings.

    Args:
        rules: storage rules on this mesh.
        optimizer_rules: by which moments lie; default: where their parameter does.
        frozen: declarations of other models, by name.
    """
    params = param_shardings(specs, rules, mesh)
    layout = param_shardings(specs, optimizer_rules or rules, mesh)
    opt_state = abstract_opt_state(optimizer, specs, layout)
    return TrainState(
        step=NamedSharding(mesh, rules.spec()),
        params=params,
        opt_state=jax.tree.map(lambda leaf: leaf.sharding, opt_state),
        ema=params if ema else None,
        frozen={name: param_shardings(own, rules, mesh) for name, own in frozen.items()},
    )
