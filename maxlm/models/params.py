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
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

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
    by_rule: bool = False
    """Its gradient is no slope of the loss but what a rule says to move against; optimizers step
    against its sign by a fixed amount, and keep it out of clipping."""
    dtype: Any = jnp.float32

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
    by_rule: bool = False,
) -> nnx.Param:
    """A parameter without values, to be assigned to a module's attribute."""
    spec = ParamSpec(shape, axes, init, role, contract, by_rule)
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec)


def truncated_normal(std: float) -> Initializer:
    """Normal values cut at two deviations, widened so that what is left has deviation ``std``."""
    kept = 0.879625661034239  # sqrt(1 - 4·φ(2) / (2·Φ(2) - 1)), of a unit normal cut at ±2
    return jax.nn.initializers.truncated_normal(std / kept)


def spec_of(param: nnx.Param) -> ParamSpec:
    """The declaration behind a module's parameter."""
    return param.get_metadata("spec")


def compute_view(param: nnx.Param, rules: AxisRules, dtype: Any) -> jax.Array:
    """A parameter as the maths wants it: cast first, then moved to its compute layout.

    Under ZeRO-3 this is the all-gather of a layer's weights, in the compute dtype; its transpose
    is the reduction of their gradient. Call it inside the rematerialised layer, so that gathered
    weights are not kept for the backward pass.
    """
    value = param[...]
    axes = spec_of(param).axes[-value.ndim :]  # inside a scan the leading layer axis is gone
    return reshard(value.astype(dtype), rules.spec(*axes))


def stack(module: ModuleT, depth: int) -> ModuleT:
    """Give every parameter of ``module`` a leading ``layers`` axis of size ``depth``."""
    graphdef, state = nnx.split(module)

    def deepen(param: nnx.Param) -> nnx.Param:
        spec = spec_of(param)
        spec = replace(
            spec,
            shape=(depth, *spec.shape),
            axes=("layers", *spec.axes),
            contract=tuple(d + 1 for d in spec.contract),
        )
        return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec)

    deep = jax.tree.map(deepen, state, is_leaf=lambda x: isinstance(x, nnx.Param))
    return nnx.merge(graphdef, deep)


def param_specs(module: nnx.Module) -> Params:
    """The declarations of all parameters, as a nested dict of :class:`ParamSpec`."""
    specs: Params = {}
    for path, param in nnx.to_flat_state(nnx.split(module)[1]):
        node = specs
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = spec_of(param)
    return specs


def named(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict flattened to canonical names, ``{"layers.attention.query": ...}``."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value, name = tree[key], f"{prefix}{key}"
        flat |= named(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def init_params(specs: Params, key: jax.Array) -> Params:
    """Initial values: each parameter's depend on ``key`` and its own name and layer alone.

    Pure; under ``maxlm.sharding.jit_in_place`` no parameter is ever whole on one device.
    """

    def init(name: str, spec: ParamSpec) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if spec.axes[:1] != ("layers",):
            return spec.init(own, spec.shape, spec.dtype)
        layers = jax.vmap(lambda i: jax.random.fold_in(own, i))(jnp.arange(spec.shape[0]))
        return jax.vmap(lambda k: spec.init(k, spec.shape[1:], spec.dtype))(layers)

    def walk(tree: Mapping[str, Any], prefix: str) -> Params:
        return {
            k: walk(v, f"{prefix}{k}.") if isinstance(v, Mapping) else init(f"{prefix}{k}", v)
            for k, v in tree.items()
        }

    return walk(specs, "")


def bind(module: ModuleT, params: Params) -> ModuleT:
    """The module with values in place of its declarations; pure, ``module`` is unchanged."""
    graphdef, state = nnx.split(module)
    values = named(params)
    flat = [
        (path, nnx.Param(values.pop(".".join(map(str, path))), spec=spec_of(param)))
        for path, param in nnx.to_flat_state(state)
    ]
    assert not values, f"the module has no parameter {next(iter(values))}"
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
