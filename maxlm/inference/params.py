"""Parameters as inference reads them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard

from maxlm.models.architectures import Model
from maxlm.models.params import (
    FusedKernel,
    Params,
    ParamSpec,
    UnstackedParam,
    flatten_names,
    is_leaf,
    param_specs,
)
from maxlm.parallel.linear import can_fuse_kernels, fuse_kernels

_fuse_kernels = jax.jit(fuse_kernels)


def prepare_params(model: Model, params: Params) -> Params:
    """Returns parameters laid out for use: in their compute layout on the mesh that
    they lie on, matrices and tables cast to the compute dtype, the decoder's layers out
    of their stacks. One array after the other, so that little is held twice."""
    stacks = tuple(f"{stack}." for stack in getattr(model, "stacks", {}))
    rules = model.rules.model_copy(update={"layers": ()})

    def lay_out(spec: ParamSpec, x: jax.Array, unstack: bool) -> Any:
        castable = spec.role in ("matrix", "table") and jnp.issubdtype(
            spec.dtype, jnp.floating
        )
        dtype = model.dtype if castable else x.dtype
        lead = spec.num_layer_axes if unstack else 0
        return _lay_out(x, rules.spec(*spec.axes), jnp.dtype(dtype), lead)

    def prepare(name: str, spec: Any, held: Any) -> Any:
        unstack = name.startswith(stacks)
        laid_out = jax.tree.map(partial(lay_out, unstack=unstack), spec, held)
        if not unstack:
            return laid_out
        tree = jax.tree.structure(held)
        layers = zip(*tree.flatten_up_to(laid_out), strict=True)
        return UnstackedParam(tuple(map(tree.unflatten, layers)))

    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
        specs = flatten_names(param_specs(model), is_leaf)
        held = flatten_names(params, is_leaf)
        values = {name: prepare(name, specs[name], own) for name, own in held.items()}
        for names in _list_joint_kernels(model, specs):
            layers = zip(*(values[name].layers for name in names), strict=True)
            fused = tuple(FusedKernel(_fuse_kernels(kernels)) for kernels in layers)
            values |= dict.fromkeys(
                names, UnstackedParam((FusedKernel(None),) * len(fused))
            )
            values[names[0]] = UnstackedParam(fused)
    values = list(values.values())
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_leaf), values)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _lay_out(x: jax.Array, spec: PartitionSpec, dtype: Any, lead: int) -> Any:
    """The array, or with ``lead`` axes that count layers a list of each layer's."""
    x = reshard(x.astype(dtype), spec)
    return list(x.reshape(-1, *x.shape[lead:])) if lead else x


def _list_joint_kernels(model: Any, specs: dict[str, Any]) -> list[list[str]]:
    """Names of kernels that one product can read together."""
    found = []
    if model.rules.residual or model.rules.embed:
        return found
    for stack, block in getattr(model, "stacks", {}).items():
        for layer in (block.mixer, block.ffn):
            for group in getattr(layer, "joint_projections", ()):
                names = [f"{stack}.{layer.name}.{each}.kernel" for each in group]
                own = [
                    specs[name]
                    for name in names
                    if isinstance(specs.get(name), ParamSpec)
                ]
                axes = [spec.axes[spec.num_layer_axes :] for spec in own]
                whole = len(own) == len(names)
                if whole and can_fuse_kernels(
                    [model.rules.spec(*each) for each in axes]
                ):
                    found.append(names)
    return found
