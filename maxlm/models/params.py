"""Parameters: declared once, as data.

A module's constructor declares each parameter's shape, logical axes, initialiser and role, and
allocates nothing: a 405B model is built in milliseconds. Everything else is derived from those
declarations: the plan's table, shardings, real values created in place on their devices,
optimizer masks. Parameters then travel as plain nested dicts; :func:`bind` puts them back into
the module for one pure call.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

from maxlm.config import MaxlmError
from maxlm.parallel.local import Dims, dimensions, layout
from maxlm.parallel.local import spec_of as dims_spec
from maxlm.sharding import AxisRules

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Params = dict[str, Any]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)


@dataclass(frozen=True)
class ParamSpec:
    """Everything there is to know of a parameter before it has values."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of each dimension (a field of AxisRules, or None)."""
    init: Initializer
    role: Literal["matrix", "table", "vector"]
    """matrix: a hidden layer's linear map (decayed, orthogonalised by Muon); table: embeddings,
    the output head and routers (decayed); vector: norm scales and biases (neither)."""
    contract: tuple[int, ...] = ()
    """Of a matrix: the dimensions summed over with the input; the others index the output."""
    sign_update: bool = False
    """Its gradient is no slope of the loss but what a rule says to move against; optimizers step
    against its sign by a fixed amount, and keep it out of clipping."""
    dtype: Any = jnp.float32

    @property
    def lead(self) -> int:
        """Leading dimensions that count layers: 0 of a parameter outside the stack."""
        return self.axes.index("layers") + 1 if "layers" in self.axes else 0

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize


def declare(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    role: Literal["matrix", "table", "vector"],
    contract: tuple[int, ...] = (),
    sign_update: bool = False,
) -> nnx.Param:
    """A parameter without values, to be assigned to a module's attribute."""
    spec = ParamSpec(shape, axes, init, role, contract, sign_update)
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec)


def truncated_normal(std: float) -> Initializer:
    """Normal values cut at two deviations, widened so that what is left has deviation ``std``."""
    kept = 0.879625661034239  # sqrt(1 - 4·φ(2) / (2·Φ(2) - 1)), of a unit normal cut at ±2
    return jax.nn.initializers.truncated_normal(std / kept)


def get_spec(param: nnx.Param) -> ParamSpec:
    """The declaration behind a module's parameter."""
    return param.get_metadata("spec")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatheredParam:
    """A parameter that is at hand whole, with the share of it that its gradient is kept for.

    ZeRO-2: the gradient is reduced straight to that share, ``value``; ``whole`` is only read, and
    saves gathering it. Stands in a module where a parameter's array does.
    """

    value: jax.Array
    whole: jax.Array


class Weight(NamedTuple):
    """A parameter for a program on shards, which gathers it and reduces its gradient itself."""

    value: jax.Array
    """In its storage layout."""
    used: Dims
    """The mesh axes of its dimensions in use; they begin those in storage."""
    whole: jax.Array | None = None
    """The same in use, if it need not be gathered."""


def weight(param: nnx.Param, rules: AxisRules, dtype: Any) -> Weight:
    """A parameter cast to ``dtype``, for ``maxlm.parallel``.

    Casting comes first, so that under ZeRO-3 the compute dtype crosses the wire.
    """
    held, whole = param.get_value(), None
    value = (held.value if isinstance(held, GatheredParam) else held).astype(dtype)
    axes = get_spec(param).axes[-value.ndim :]  # inside a scan the leading layer axis is gone
    used = dimensions(rules.spec(*axes), value.ndim)
    if isinstance(held, GatheredParam):
        whole = reshard(jax.lax.stop_gradient(held.whole).astype(dtype), dims_spec(used))
    if any(have[: len(want)] != want for have, want in zip(layout(value), used, strict=True)):
        value = reshard(value, rules.spec(*axes))  # stored on other axes altogether
    return Weight(value, used, whole)


def compute_view(param: nnx.Param, rules: AxisRules, dtype: Any) -> jax.Array:
    """A parameter cast to ``dtype`` and moved to its compute layout; for small ones, whose
    gradient may be reduced whole, and where there is no gradient."""
    own = weight(param, rules, dtype)
    return reshard(own.value, dims_spec(own.used))


def stack(module: ModuleT, depth: int, groups: int = 1) -> ModuleT:
    """Give every parameter of ``module`` a leading ``layers`` axis of size ``depth``.

    Args:
        groups: of layers in a pipeline stage; for more than one the axis becomes two,
            [groups, depth / groups], so that splitting the second gives each stage its share of
            every group.

    Raises:
        MaxlmError: a depth that does not divide into groups.
    """
    if depth % groups:
        raise MaxlmError(
            f"{depth} layers do not divide into {groups} groups a stage",
            where="parallel.layer_groups",
            fix=f"use a divisor of {depth}",
        )
    lead = (depth,) if groups == 1 else (groups, depth // groups)
    graphdef, state = nnx.split(module)

    def deepen(param: nnx.Param) -> nnx.Param:
        spec = get_spec(param)
        spec = replace(
            spec,
            shape=(*lead, *spec.shape),
            axes=(*(None,) * (len(lead) - 1), "layers", *spec.axes),
            contract=tuple(d + len(lead) for d in spec.contract),
        )
        return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec)

    deep = jax.tree.map(deepen, state, is_leaf=lambda x: isinstance(x, nnx.Param))
    return nnx.merge(graphdef, deep)


def param_specs(module: nnx.Module) -> Params:
    """The declarations of all parameters, as a nested dict of :class:`ParamSpec`."""
    return _nested(module, get_spec)


def get_values(module: nnx.Module) -> Params:
    """The parameters of a bound module; the inverse of :func:`bind`."""
    return _nested(module, lambda param: param.get_value())


def _nested(module: nnx.Module, leaf: Callable[[nnx.Param], Any]) -> Params:
    nested: Params = {}
    for path, param in nnx.to_flat_state(nnx.split(module)[1]):
        node = nested
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = leaf(param)
    return nested


def flatten_names(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict flattened to canonical names, ``{"layers.attention.query": ...}``."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value, name = tree[key], f"{prefix}{key}"
        flat |= flatten_names(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def init_params(specs: Params, key: jax.Array) -> Params:
    """Initial values: each parameter's depend on ``key`` and its own name and layer alone.

    Pure; under ``maxlm.sharding.jit_sharded`` no parameter is ever whole on one device.
    """

    def init(name: str, spec: ParamSpec) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if not spec.lead:
            return spec.init(own, spec.shape, spec.dtype)
        numbers = jnp.arange(prod(spec.shape[: spec.lead]))
        layers = jax.vmap(lambda i: jax.random.fold_in(own, i))(numbers)
        values = jax.vmap(lambda k: spec.init(k, spec.shape[spec.lead :], spec.dtype))(layers)
        return values.reshape(spec.shape)

    def walk(tree: Mapping[str, Any], prefix: str) -> Params:
        return {
            k: walk(v, f"{prefix}{k}.") if isinstance(v, Mapping) else init(f"{prefix}{k}", v)
            for k, v in tree.items()
        }

    return walk(specs, "")


def bind(module: ModuleT, params: Params) -> ModuleT:
    """The module with values in place of its declarations; pure, ``module`` is unchanged.

    Of a stacked block's parameters, those of one layer make a block.
    """
    graphdef, state = nnx.split(module)
    given = flatten_names(params)
    flat = [
        (path, nnx.Param(given.pop(".".join(map(str, path))), spec=get_spec(param)))
        for path, param in nnx.to_flat_state(state)
    ]
    assert not given, f"the module has no parameter {next(iter(given))}"
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
