"""Adapters: other ways in which a model's parameters are stored, beside small trained
ones.

An adapter is a config with a ``kind`` and one method, from declarations to
declarations. To add one, write an :class:`Adapter` and register it in
``maxlm.adapters.ADAPTERS``.
"""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from maxlm.models.params import (
    Leaf,
    Params,
    ParamSpec,
    replace_base_params,
    select_base_params,
)
from maxlm.models.transforms import ParamTransform


class Adapter(ParamTransform):
    """A way to adapt a model, with a ``kind`` of its own and that kind's settings. One
    that has parameters for virtual tokens says in a setting ``num_virtual_tokens`` how
    many there are."""

    kind: Any
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the base's matrices and tables, in memory and in checkpoints; nothing
    may train them in bfloat16."""

    @property
    def changes_base(self) -> bool:
        """Whether :meth:`init_from_base` changes the base: alone it is another
        model."""
        return False

    def init_from_base(self, params: Params) -> Params:
        """Returns fresh parameters, the base's among them, with new values for those
        that depend on the base."""
        return params

    def adapt(self, specs: Params) -> Params:
        """Returns the declarations of a model with a :class:`~maxlm.models.params.Leaf`
        of declarations in place of each parameter that is adapted."""
        raise NotImplementedError

    def transform_specs(self, specs: Params) -> Params:
        adapted = self.adapt(specs)
        if self.base_dtype == "float32":
            return adapted
        return _store_base_as(adapted, jnp.dtype(self.base_dtype))


def count_virtual_tokens(adapter: Adapter | None) -> int:
    """Returns the tokens that every example begins with and an adapter has parameters
    for: those at positions below it; real tokens follow."""
    return getattr(adapter, "num_virtual_tokens", 0)


def _store_base_as(specs: Params, dtype: DTypeLike) -> Params:
    """Returns declarations with another dtype for the base's matrices and tables; heads
    of a task, which are trained beside an adapter, stay, and so do codes and scales."""

    def set_dtype(spec: ParamSpec) -> ParamSpec:
        if spec.role in ("vector", "packed"):
            return spec
        return replace(spec, dtype=dtype)

    base = {}
    for name, module_specs in select_base_params(specs).items():
        if name == "heads":
            base[name] = module_specs
        else:
            base[name] = jax.tree.map(set_dtype, module_specs)
    return replace_base_params(specs, base)


_merge = jax.jit(lambda leaf: leaf.merge())


def merge_adapter(specs: Params, params: Params) -> tuple[Params, Params]:
    """Returns declarations and parameters with the array of :meth:`Leaf.merge` in place
    of each leaf that has one; the others stay. Runs under the mesh of the parameters,
    which it takes out of ``params`` one by one, so that few are in memory twice."""
    merged_specs = dict(specs)
    merged: Params = {}
    for name in sorted(params):  # a bias before its kernel
        param = params.pop(name)
        if isinstance(param, dict):
            merged_specs[name], merged[name] = merge_adapter(specs[name], param)
            continue
        merged[name] = param
        if not isinstance(param, Leaf) or not param.base_field:
            continue
        value = _merge(param)
        if value is None:
            continue
        base_spec = getattr(specs[name], param.base_field)
        merged_specs[name] = replace(base_spec, dtype=value.dtype)
        merged[name] = value
        if name == "kernel" and "bias" in merged:
            merged["bias"] = param.merge_bias(merged["bias"])
    return merged_specs, merged
