"""Parameters as inference reads them."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, reshard

from maxlm.config import MaxlmError
from maxlm.models.architectures import Model
from maxlm.models.params import (
    SHARED_BLOCKS,
    FusedKernel,
    PackedParam,
    Params,
    ParamSpec,
    StoredParam,
    UnstackedParam,
    flatten_names,
    get_base,
    get_dense_spec,
    is_leaf,
    param_specs,
    take_stacked_layer,
)
from maxlm.parallel.linear import can_fuse_kernels, fuse_kernels


def prepare_params(
    model: Model, params: Params, mesh: Mesh | None = None, *, fuse: bool = True
) -> Params:
    """Returns parameters laid out for use: in their compute layout, matrices and tables
    cast to the compute dtype (codes and scales of quantized ones are not), the
    decoder's layers out of their stacks. One array after the other, so that little is
    held twice. ``mesh``: to lay them out on; default: that which they lie on. ``fuse``:
    whether kernels of the same input lie side by side."""
    params_mesh: Mesh = jax.tree.leaves(params)[0].sharding.mesh
    target_mesh = params_mesh if mesh is None else mesh
    stacks = getattr(model, "stacks", {})
    stack_prefixes = tuple(f"{stack}." for stack in stacks)
    # Layers leave their stacks, so that no mesh axis splits them.
    rules = model.rules.model_copy(update={"layers": ()})

    def lay_out(
        spec: ParamSpec, x: jax.Array, unstack: bool
    ) -> jax.Array | list[jax.Array]:
        # Vectors (norms, sinks) stay as precise as they are stored.
        is_float = jnp.issubdtype(spec.dtype, jnp.floating)
        is_cast = is_float and spec.role in ("matrix", "table")
        dtype = jnp.dtype(model.dtype if is_cast else x.dtype)
        layout = rules.spec(*spec.axes)
        num_layer_axes = spec.num_layer_axes if unstack else 0
        if target_mesh != params_mesh:
            # In the compute dtype, so that less crosses the wire.
            with jax.set_mesh(params_mesh):
                narrow = x.astype(dtype)
            x = jax.device_put(narrow, NamedSharding(target_mesh, layout))
        return _lay_out(x, layout, dtype, num_layer_axes)

    def prepare(name: str, spec: StoredParam, value: StoredParam) -> StoredParam:
        unstack = name.startswith(stack_prefixes)
        laid_out = jax.tree.map(partial(lay_out, unstack=unstack), spec, value)
        if not unstack:
            return laid_out
        # A leaf of several arrays, each now a list over layers → a leaf for each layer.
        structure = jax.tree.structure(value)
        layers_by_array = structure.flatten_up_to(laid_out)
        arrays_by_layer = zip(*layers_by_array, strict=True)
        layers = [structure.unflatten(arrays) for arrays in arrays_by_layer]
        return UnstackedParam(tuple(layers))

    with jax.set_mesh(target_mesh):
        specs = flatten_names(param_specs(model), is_leaf)
        values: dict[str, StoredParam] = {}
        for name, value in flatten_names(params, is_leaf).items():
            values[name] = prepare(name, specs[name], value)

        for names in _list_joint_kernels(model, specs) if fuse else ():
            # The first of them has the joint kernel; the others are read through it.
            first, *others = names
            joint = _join_stored_kernels([values[name] for name in names])
            if joint is None:
                continue
            values[first] = joint
            empty: StoredParam = FusedKernel(None)
            if isinstance(joint, UnstackedParam):
                empty = UnstackedParam((empty,) * len(joint.layers))
            values |= dict.fromkeys(others, empty)
    structure = jax.tree.structure(params, is_leaf=is_leaf)
    return jax.tree.unflatten(structure, list(values.values()))


def unstack_params(model: Model, params: Params) -> Params:
    """Returns stored parameters with an :class:`UnstackedParam` in place of each stack
    of layers. Of what a program reads, its layers are slices."""
    specs = flatten_names(param_specs(model), is_leaf)
    stack_prefixes = tuple(f"{stack}." for stack in getattr(model, "stacks", {}))

    def unstack(name: str, value: StoredParam) -> StoredParam:
        if not name.startswith(stack_prefixes):
            return value
        num_layers = jax.tree.leaves(specs[name])[0].shape[0]
        layers = (take_stacked_layer(value, layer) for layer in range(num_layers))
        return UnstackedParam(tuple(layers))

    flat = flatten_names(params, is_leaf)
    values = [unstack(name, value) for name, value in flat.items()]
    structure = jax.tree.structure(params, is_leaf=is_leaf)
    return jax.tree.unflatten(structure, values)


def check_params(model: Model, params: Params) -> None:
    """Checks that parameters have the names and shapes of a model's; raises
    MaxlmError."""
    where = "parameters of the engine"
    fix = "give those of the model that the engine was made for"
    expected = flatten_names(param_specs(model))
    arrays = flatten_names(params)
    if expected.keys() != arrays.keys():
        differing = sorted(expected.keys() ^ arrays.keys())
        message = f"names differ from the model's: {', '.join(differing)[:200]}"
        raise MaxlmError(message, where=where, fix=fix)
    for name, spec in expected.items():
        shape = arrays[name].shape
        if shape != spec.shape:
            message = f"{name} has shape {[*shape]}, the model's {[*spec.shape]}"
            raise MaxlmError(message, where=where, fix=fix)


def check_shareable(model: Model, params: Params, mesh: Mesh) -> None:
    """Checks that steps on ``mesh`` can read parameters as they are stored; raises
    MaxlmError."""
    where = "shares_params"
    fix = "set shares_params=false: the engine then has a copy of its own"
    if jax.tree.leaves(params)[0].sharding.mesh != mesh:
        message = "the parameters lie on another mesh than the engine's"
        raise MaxlmError(message, where=where, fix=fix)
    if model.rules.layers:
        axes = " and ".join(model.rules.layers)
        message = f"layers are split over {axes}, and every device runs all of them"
        raise MaxlmError(message, where=where, fix=fix)


def _join_stored_kernels(kernels: Sequence[StoredParam]) -> StoredParam | None:
    """Returns kernels of the same input side by side, those of each layer where they
    are a layer's; None: they cannot stand so."""
    if not isinstance(kernels[0], UnstackedParam):  # layers share them
        fused = _fuse_kernels(tuple(kernels))
        return None if fused is None else FusedKernel(fused)
    layers = []
    for layer_kernels in zip(*(kernel.layers for kernel in kernels), strict=True):
        fused = _fuse_kernels(layer_kernels)
        if fused is None:
            return None
        layers.append(FusedKernel(fused))
    return UnstackedParam(tuple(layers))


@jax.jit
def _fuse_kernels(kernels: tuple[StoredParam, ...]) -> StoredParam | None:
    first, *others = kernels
    if isinstance(first, PackedParam):
        return first.stand_beside(others)
    return fuse_kernels(kernels)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _lay_out(
    x: jax.Array, spec: PartitionSpec, dtype: jnp.dtype, num_layer_axes: int
) -> jax.Array | list[jax.Array]:
    """Returns the array, or where it has axes that count layers a list of each
    layer's."""
    x = reshard(x.astype(dtype), spec)
    if not num_layer_axes:
        return x
    layer_shape = x.shape[num_layer_axes:]
    return list(x.reshape(-1, *layer_shape))


def _list_joint_kernels(
    model: Model, specs: Mapping[str, StoredParam]
) -> list[list[str]]:
    """Returns the names of kernels that one product can read together, a list for each
    product."""
    joint_kernels: list[list[str]] = []
    # Only kernels whose inputs are whole lie side by side (can_fuse_kernels).
    if model.rules.residual or model.rules.embed:
        return joint_kernels
    for path, module in _list_modules(model):
        for group in getattr(module, "joint_projections", ()):
            names = [f"{path}.{part}.kernel" for part in group]
            layouts: list[PartitionSpec] = []
            for name in names:
                stored = specs.get(name)
                # One that is absent or adapted is not fused.
                if stored is not None and get_base(stored) is stored:
                    spec = get_dense_spec(stored)
                    layer_axes = spec.axes[spec.num_layer_axes :]
                    layouts.append(model.rules.spec(*layer_axes))
            is_complete = len(layouts) == len(names)
            if is_complete and can_fuse_kernels(layouts):
                joint_kernels.append(names)
    return joint_kernels


def _list_modules(model: Model) -> list[tuple[str, nnx.Module]]:
    """Lists mixers and feed-forwards of layers, and modules that layers share, with
    their places among the parameters."""
    modules: list[tuple[str, nnx.Module]] = []
    for stack, block in getattr(model, "stacks", {}).items():
        for layer in (block.mixer, block.ffn):
            if layer is not None:
                modules.append((f"{stack}.{layer.name}", layer))
    for name, module in getattr(model, "shared_blocks", {}).items():
        modules.append((f"{SHARED_BLOCKS}.{name}", module))
    return modules
