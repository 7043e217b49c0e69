"""Selects the kernels that an adapter changes, and the shapes of what it adds to
them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import jax

from maxlm.config import MaxlmError
from maxlm.models.params import (
    SHARED_BLOCKS,
    Initializer,
    Params,
    ParamSpec,
    StoredParam,
    flatten_names,
    is_leaf,
)

EXPERTS = "experts"
"""The target of all kernels of routed experts."""


def replace_targets(
    specs: Params,
    targets: Sequence[str] | None,
    adapt: Callable[[str, ParamSpec], StoredParam],
) -> Params:
    """Returns declarations with ``adapt(name, spec)`` in place of the targets.
    ``targets``: names of maps, such as ``query`` or ``mlp.up``, or patterns of their
    full names; ``experts``. None: all linear maps of layers."""
    flat: Mapping[str, StoredParam] = flatten_names(specs, is_leaf)
    candidates = {
        name: spec
        for name, spec in flat.items()
        if not is_leaf(spec) and (spec.contracting_dims or name == "embedding.table")
    }
    if targets is None:
        chosen = _find_layer_maps(candidates)
    else:
        chosen = set()
        for target in targets:
            chosen.update(_find_target(candidates, target))
    adapted = [
        adapt(name, spec) if name in chosen else spec for name, spec in flat.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_leaf), adapted)


def _find_layer_maps(candidates: Mapping[str, ParamSpec]) -> set[str]:
    """Finds the linear maps of layers, those of routed experts left out: they are not
    named ``kernel``. One that several layers share is among them once."""
    return {
        name
        for name, spec in candidates.items()
        if name.endswith(".kernel")
        and (spec.num_layer_axes or name.startswith(f"{SHARED_BLOCKS}."))
    }


def _find_target(candidates: Mapping[str, ParamSpec], target: str) -> list[str]:
    """Finds the parameters that a target names; raises MaxlmError where there are
    none."""
    modules = {
        name: name.removesuffix(".kernel").removesuffix(".table") for name in candidates
    }

    def is_meant(name: str, spec: ParamSpec) -> bool:
        is_expert = "expert" in spec.axes
        if target == EXPERTS:
            return is_expert
        module = modules[name]
        if fnmatchcase(name, target) or fnmatchcase(module, target):
            return True
        # `up` is no expert's: they are many more, and have a target of their own.
        if is_expert and "." not in target:
            return False
        return fnmatchcase(module, f"*.{target}")

    matching = [name for name, spec in candidates.items() if is_meant(name, spec)]
    if not matching:
        last_parts = [module.rpartition(".")[2] for module in modules.values()]
        known = list(dict.fromkeys([*last_parts, *modules.values()]))
        near = get_close_matches(target, known, n=3, cutoff=0.3) or known[:3]
        raise MaxlmError(
            f"{target!r} is no linear map of this model",
            where="adapter.targets",
            fix=f"use a name such as {', '.join(near)}",
        )
    return matching


def split_dims(spec: ParamSpec) -> tuple[int, int]:
    """Returns the number of dimensions before a kernel's inputs, and of those before
    its outputs; a table's rows are inputs."""
    inputs = spec.contracting_dims or (spec.num_layer_axes,)
    return inputs[0], inputs[-1] + 1


def declare_input_map(spec: ParamSpec, rank: int, init: Initializer) -> ParamSpec:
    """Declares a map from a kernel's inputs to ``rank`` numbers."""
    _, output_start = split_dims(spec)
    return replace(
        spec,
        shape=(*spec.shape[:output_start], rank),
        axes=(*spec.axes[:output_start], None),
        init=init,
    )


def declare_output_map(spec: ParamSpec, rank: int, init: Initializer) -> ParamSpec:
    """Declares a map from ``rank`` numbers to a kernel's outputs."""
    input_start, output_start = split_dims(spec)
    return replace(
        spec,
        shape=(*spec.shape[:input_start], rank, *spec.shape[output_start:]),
        axes=(*spec.axes[:input_start], None, *spec.axes[output_start:]),
        contracting_dims=(input_start,),
        init=init,
    )


def declare_vector(
    spec: ParamSpec, init: Initializer, *, of_inputs: bool = False
) -> ParamSpec:
    """Declares a number for each of a kernel's outputs, or inputs."""
    input_start, output_start = split_dims(spec)
    inputs = slice(input_start, output_start)
    outputs = slice(output_start, None)
    dims = inputs if of_inputs else outputs
    return replace(
        spec,
        shape=(*spec.shape[:input_start], *spec.shape[dims]),
        axes=(*spec.axes[:input_start], *spec.axes[dims]),
        role="vector",
        contracting_dims=(),
        init=init,
    )
