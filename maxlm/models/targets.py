"""Selects parameters by the names that users give, and tells their inputs from their
outputs."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import jax

from maxlm.config import MaxlmError
from maxlm.models.params import (
    SHARED_BLOCKS,
    Params,
    ParamSpec,
    StoredParam,
    flatten_names,
    get_base,
    get_dense_spec,
    is_leaf,
)

EXPERTS = "experts"
"""The target of all kernels of routed experts."""


def replace_targets(
    specs: Params,
    targets: Sequence[str] | None,
    adapt: Callable[[str, ParamSpec, StoredParam], StoredParam],
    *,
    setting: str,
) -> Params:
    """Returns declarations with ``adapt(name, spec, stored)`` in place of the targets:
    ``stored`` is what stands there, ``spec`` the array that it stands for.
    ``targets``: names of maps, such as ``query`` or ``mlp.up``, or patterns of their
    full names; ``experts``. None: all linear maps of layers. ``setting``: their name in
    messages."""
    flat: Mapping[str, StoredParam] = flatten_names(specs, is_leaf)
    candidates: dict[str, ParamSpec] = {}
    for name, stored in flat.items():
        spec = get_dense_spec(stored)
        is_adapted = get_base(stored) is not stored
        if not is_adapted and (spec.contracting_dims or name == "embedding.table"):
            candidates[name] = spec
    if targets is None:
        chosen = find_layer_map_names(candidates)
    else:
        chosen = set()
        for target in targets:
            chosen.update(find_target_names(candidates, target, setting))
    adapted = [
        adapt(name, candidates[name], stored) if name in chosen else stored
        for name, stored in flat.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_leaf), adapted)


def find_layer_map_names(candidates: Mapping[str, ParamSpec]) -> set[str]:
    """Finds the linear maps of layers, those of routed experts left out: they are not
    named ``kernel``. One that several layers share is among them once."""
    return {
        name
        for name, spec in candidates.items()
        if name.endswith(".kernel")
        and (spec.num_layer_axes or name.startswith(f"{SHARED_BLOCKS}."))
    }


def find_target_names(
    candidates: Mapping[str, ParamSpec], target: str, setting: str
) -> list[str]:
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
            where=setting,
            fix=f"use a name such as {', '.join(near)}",
        )
    return matching


def split_dims(spec: ParamSpec) -> tuple[int, int]:
    """Returns the number of dimensions before a kernel's inputs, and of those before
    its outputs; a table's rows are inputs."""
    inputs = spec.contracting_dims or (spec.num_layer_axes,)
    return inputs[0], inputs[-1] + 1
