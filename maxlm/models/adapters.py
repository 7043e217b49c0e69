"""Adapters: other ways in which a model's parameters rest, such as beside small trained
ones.

An adapter is a config with a ``kind`` and one method, from declarations to
declarations. To add one, write an :class:`Adapter` and register it in
``maxlm.adapters.ADAPTERS``.
"""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from maxlm.config import Config
from maxlm.models.architectures import Model, ModelConfig
from maxlm.models.params import (
    Leaf,
    Params,
    ParamSpec,
    bind_specs,
    param_specs,
    replace_base_params,
    select_base_params,
)


class Adapter(Config):
    """A way to adapt a model, with a ``kind`` of its own and that kind's settings. One
    that has parameters for virtual tokens says in a setting ``num_virtual_tokens`` how
    many there are."""

    kind: Any
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the base's matrices and tables at rest and in checkpoints; nothing may
    train them in bfloat16."""

    @property
    def changes_base(self) -> bool:
        """Whether :meth:`init_from_base` changes the base: alone it is another
        model."""
        return False

    def init_from_base(self, params: Params) -> Params:
        """Return fresh parameters with those that depend on the base, which are in
        them."""
        return params

    def adapt(self, specs: Params) -> Params:
        """Return the declarations of a model with a :class:`~maxlm.models.params.Leaf`
        of declarations in place of each parameter that is adapted."""
        raise NotImplementedError


def count_virtual_tokens(adapter: Adapter | None) -> int:
    """Returns the tokens that every example begins with and an adapter has parameters
    for: those at positions below it; real tokens follow."""
    return getattr(adapter, "num_virtual_tokens", 0)


def build_adapted_model(
    config: ModelConfig, adapter: Adapter | None, **kwargs: Any
) -> Model:
    """Builds a model whose parameters rest as its adapter says, by
    ``config.build(**kwargs)``."""
    model = config.build(**kwargs)
    if adapter is None:
        return model
    specs = adapter.adapt(param_specs(model))
    if adapter.base_dtype != "float32":
        dtype = jnp.dtype(adapter.base_dtype)
        base = select_base_params(specs)

        def store(spec: ParamSpec) -> ParamSpec:
            return spec if spec.role == "vector" else replace(spec, dtype=dtype)

        rest = {
            name: own if name == "heads" else jax.tree.map(store, own)
            for name, own in base.items()
        }
        specs = replace_base_params(specs, rest)
    model = bind_specs(model, specs)
    model.num_virtual_tokens = count_virtual_tokens(adapter)
    return model


_merge = jax.jit(lambda leaf: leaf.merge())


def merge_adapter(specs: Params, params: Params) -> tuple[Params, Params]:
    """Return declarations and parameters with the array of :meth:`Leaf.merge` in place
    of each leaf that has one; the others stay. Runs under the mesh of the parameters,
    which it takes out of ``params`` one by one, so that little is held twice."""
    merged_specs = dict(specs)
    merged = dict[str, Any]()
    for name in sorted(params):  # a bias before its kernel
        held = params.pop(name)
        if isinstance(held, dict):
            merged_specs[name], merged[name] = merge_adapter(specs[name], held)
            continue
        merged[name] = held
        if (
            isinstance(held, Leaf)
            and held.base_field
            and (value := _merge(held)) is not None
        ):
            base = getattr(specs[name], held.base_field)
            merged_specs[name], merged[name] = replace(base, dtype=value.dtype), value
            if name == "kernel" and "bias" in merged:
                merged["bias"] = held.merge_bias(merged["bias"])
    return merged_specs, merged
