"""The state of a run, how it lies on the mesh, and which of its parameters are trained.

A part of a tree of parameters is that tree with None for the arrays that are not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import filter as filter_names
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from maxlm.config import MaxlmError
from maxlm.models.params import (
    AUXILIARY,
    GatheredParam,
    Params,
    flatten_names,
    is_leaf,
    join_path,
)
from maxlm.parallel.layers import PyTree
from maxlm.sharding import AxisRules


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes; with other leaves than arrays, their shapes or
    shardings.

    The data's position is ``step`` itself; so is the randomness's."""

    step: Any
    """int32: steps taken."""
    params: Params
    """fp32 master parameters, a nested dict."""
    opt_state: optax.OptState
    ema: Params | None
    """Exponential moving average of the parameters, or None."""
    frozen: dict[str, Params] = field(default_factory=dict)
    """Parameters of the other models that the task reads, by the task's names for them.
    They never change, and checkpoints, which hold all else, say where they came from in
    their place."""
    task: dict[str, Any] = field(default_factory=dict)
    """Small arrays of the task's own (``Task.init_state``), whole on every device."""


def param_shardings(
    specs: PyTree, rules: AxisRules, mesh: Mesh | AbstractMesh
) -> PyTree:
    """Returns the sharding of every array of a tree of declarations, such as a placed
    model's (``place_model``), on a real or an abstract mesh; no device is touched."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, rules.spec(*spec.axes)), specs)


def select_trainable(specs: Params, patterns: Sequence[str] | None) -> Params:
    """Returns the part of a tree of declarations whose canonical names match a pattern,
    such as ``layers.attention.*``; raises MaxlmError for one that no name matches.
    None: all, or the arrays that an adapter adds, ``heads`` and auxiliary models. Codes
    and scales of quantized matrices are never among them."""
    names = [
        name for name, spec in flatten_names(specs).items() if spec.role != "packed"
    ]
    if patterns is None:
        added_names = list_added_names(specs)
        # Beside an adapter the heads of a task are trained; without one, everything.
        patterns = ["heads.*", f"{AUXILIARY}.*"] if added_names else ["*"]
        others = [name for part in patterns for name in filter_names(names, part)]
        trained_names = {*added_names, *others}
    else:
        trained_names = _match_names(names, patterns)

    trained = _keep(specs, trained_names)
    for name, spec in flatten_names(trained).items():
        if spec is not None and spec.dtype != jnp.float32:
            dtype = jnp.dtype(spec.dtype)
            message = f"{name} is trained, and stored in {dtype}, not float32"
            fix = "set adapter.base_dtype=float32, or narrower patterns"
            raise MaxlmError(message, where="train.trainable", fix=fix)
    return trained


def _match_names(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Returns the names that match some pattern; raises MaxlmError for a pattern that
    none matches."""
    matched: set[str] = set()
    for pattern in patterns:
        matching = filter_names(names, pattern)
        if not matching:
            near = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            message = f"{pattern!r} matches no parameter"
            fix = f"use a pattern of names such as {', '.join(near)}"
            raise MaxlmError(message, where="train.trainable", fix=fix)
        matched.update(matching)
    return matched


def split_params(params: Params, part: Params) -> tuple[Params, Params]:
    """Splits parameters into those that a part of their tree has, and the others."""
    part_names = {*flatten_names(part)}
    other_names = {*flatten_names(params)} - part_names
    return _keep(params, part_names), _keep(params, other_names)


def merge_params(a: Params, b: Params) -> Params:
    """Joins two parts of one tree; the inverse of :func:`split_params`."""

    # A GatheredParam is a pytree of two arrays, and goes over as it is.
    def is_whole(node: object) -> bool:
        return node is None or isinstance(node, GatheredParam)

    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=is_whole)


def list_added_names(specs: Params) -> set[str]:
    """Lists the names of the arrays that leaves hold beside their base."""
    added_names: set[str] = set()
    for name, leaf in flatten_names(specs, is_leaf).items():
        base_field = getattr(leaf, "base_field", None)
        if base_field:
            without_base = replace(leaf, **{base_field: None})
            added_names |= {f"{name}.{part}" for part in flatten_names(without_base)}
    return added_names


def _keep(tree: Params, names: set[str]) -> Params:
    """Returns the part of a tree with the arrays of these canonical names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, value: value if join_path(path) in names else None, tree
    )


def get_eval_params(state: TrainState) -> Params:
    """Returns the parameters to use a model with: their moving average where there is
    one."""
    return state.params if state.ema is None else state.ema
