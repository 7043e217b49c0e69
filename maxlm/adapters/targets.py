"""Selects the kernels that an adapter changes, and the shapes of what it adds to
them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.models.params import Initializer, Params, ParamSpec, flatten_names, is_leaf

EXPERTS = "experts"
"""The target of all kernels of routed experts."""


def replace_targets(
    specs: Params, targets: Sequence[str] | None, adapt: Callable[[str, ParamSpec], Any]
) -> Params:
    """Returns declarations with ``adapt(name, spec)`` in place of the targets.
    ``targets``: names of maps, such as ``query`` or ``mlp.up``, or patterns of their
    full names; ``experts``. None: all linear maps of layers."""
    flat: Mapping[str, Any] = flatten_names(specs, is_leaf)
    plain = {name: spec for name, spec in flat.items() if not is_leaf(spec)}
    candidates = {
        n: s for n, s in plain.items() if s.contracting_dims or n == "embedding.table"
    }
    if targets is None:
        names = {
            n
            for n, s in candidates.items()
            if n.endswith(".kernel") and s.num_layer_axes
        }
    else:
        names = {
            name for target in targets for name in _find_target(candidates, target)
        }
    chosen = [
        adapt(name, spec) if name in names else spec for name, spec in flat.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_leaf), chosen)


def _find_target(candidates: Mapping[str, ParamSpec], target: str) -> list[str]:
    modules = {n: n.removesuffix(".kernel").removesuffix(".table") for n in candidates}

    def is_meant(name: str, spec: ParamSpec) -> bool:
        if target == EXPERTS:
            return "expert" in spec.axes
        if any(fnmatchcase(own, target) for own in (name, modules[name])):
            return True
        # `up` is no expert's: they are many more, and have a target of their own.
        return ("expert" not in spec.axes or "." in target) and fnmatchcase(
            modules[name], f"*.{target}"
        )

    found = [name for name, spec in candidates.items() if is_meant(name, spec)]
    if not found:
        short = [module.rpartition(".")[2] for module in modules.values()]
        known = [*dict.fromkeys([*short, *modules.values()])]
        near = get_close_matches(target, known, n=3, cutoff=0.3) or known[:3]
        what = f"{target!r} is no linear map of this model"
        raise MaxlmError(
            what, where="adapter.targets", fix=f"use a name such as {', '.join(near)}"
        )
    return found


def split_dims(spec: ParamSpec) -> tuple[int, int]:
    """Returns the number of dimensions before a kernel's inputs, and of those before
    its outputs; a table's rows are inputs."""
    inputs = spec.contracting_dims or (spec.num_layer_axes,)
    return inputs[0], inputs[-1] + 1


def declare_input_map(spec: ParamSpec, rank: int, init: Initializer) -> ParamSpec:
    """Declares a map from a kernel's inputs to ``rank`` numbers."""
    _, end = split_dims(spec)
    shape, axes = (*spec.shape[:end], rank), (*spec.axes[:end], None)
    return replace(spec, shape=shape, axes=axes, init=init)


def declare_output_map(spec: ParamSpec, rank: int, init: Initializer) -> ParamSpec:
    """Declares a map from ``rank`` numbers to a kernel's outputs."""
    lead, end = split_dims(spec)
    shape = (*spec.shape[:lead], rank, *spec.shape[end:])
    axes = (*spec.axes[:lead], None, *spec.axes[end:])
    return replace(spec, shape=shape, axes=axes, contracting_dims=(lead,), init=init)


def declare_vector(
    spec: ParamSpec, init: Initializer, *, of_inputs: bool = False
) -> ParamSpec:
    """Declares a number for each of a kernel's outputs, or inputs."""
    lead, end = split_dims(spec)
    kept = slice(lead, end) if of_inputs else slice(end, None)
    shape, axes = (
        (*spec.shape[:lead], *spec.shape[kept]),
        (*spec.axes[:lead], *spec.axes[kept]),
    )
    return replace(
        spec, shape=shape, axes=axes, role="vector", contracting_dims=(), init=init
    )
