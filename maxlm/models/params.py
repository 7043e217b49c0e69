"""Parameters: declared once, as data.

A module's constructor declares each parameter's shape, logical axes, initialiser and
role, and allocates nothing: a 405B model is built in milliseconds. Everything else is
derived from those declarations: the plan's table, shardings, real values created in
place on their devices, optimizer masks. Parameters then travel as plain nested dicts;
:func:`bind` puts them back into the module for one pure call.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeVar,
    cast,
)

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard
from jax.typing import DTypeLike

from maxlm.parallel.decode_kernels import LocalProduct
from maxlm.parallel.layers import PyTree
from maxlm.parallel.linear import multiply_fused_kernel, multiply_kernels
from maxlm.parallel.local import Dims, get_layout, make_spec, parse_spec
from maxlm.parallel.operands import (
    KERNEL,
    DenseOperand,
    MapOperand,
    OperandArrays,
    PackedOperand,
)
from maxlm.sharding import AxisRules

Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]
"""``(random key, shape, dtype) -> initial values``."""
Params = dict[str, Any]
"""A model's parameters by the names of its modules, nested; or as many declarations. In
the place of each parameter stands an array (or a :class:`ParamSpec`), or a
:class:`Leaf` of them."""
StoredParam = Any
"""What stands there: an array, a :class:`Leaf`, or the declaration of one."""
ModuleT = TypeVar("ModuleT", bound=nnx.Module)
SHARED_BLOCKS = "shared_blocks"
"""Begins the names of parameters that several layers read, ``shared_blocks.block0...``:
they are in no stack of layers."""
AUXILIARY = "auxiliary"
"""Begins the names of parameters of other models that are trained beside a run's own,
``auxiliary.value.layers...``."""


@dataclass(frozen=True)
class ParamSpec:
    """Everything there is to know of a parameter before it has values."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of each dimension (a field of AxisRules, or None)."""
    init: Initializer = field(compare=False)
    role: Literal["matrix", "table", "vector", "packed"]
    """matrix: a hidden layer's linear map (decayed, orthogonalised by Muon); table:
    embeddings, the output head and routers (decayed); vector: norm scales, biases,
    sinks (neither); packed: codes and scales of a matrix, which are never trained and
    keep their dtype wherever they go."""
    contracting_dims: tuple[int, ...] = ()
    """Dimensions of a matrix summed over with the input; the others index the
    output."""
    sign_update: bool = False
    """Whether its gradient is no slope of the loss but what a rule says to move
    against; optimizers step against its sign by a fixed amount, and keep it out of
    clipping."""
    dtype: DTypeLike = jnp.float32
    layer_values: tuple[tuple[float, ...], ...] | None = None
    """Of a vector that starts with other values in each layer of a stack: these,
    whatever the seed."""

    @property
    def num_layer_axes(self) -> int:
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
    *,
    contracting_dims: tuple[int, ...] = (),
    sign_update: bool = False,
    layer_values: tuple[tuple[float, ...], ...] | None = None,
) -> nnx.Param:
    """Returns a parameter without values, to be assigned to a module's attribute;
    arguments are those of :class:`ParamSpec`."""
    spec = ParamSpec(
        shape,
        axes,
        init,
        role,
        contracting_dims,
        sign_update,
        layer_values=layer_values,
    )
    return _declare_spec(spec)


def _declare_spec(spec: ParamSpec) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec)


# sqrt(1 − 4·φ(2) / (2·Φ(2) − 1)): the deviation of a unit normal cut at ±2.
_TRUNCATED_STD = 0.879625661034239


def truncated_normal(std: float) -> Initializer:
    """Draws normal values cut at two deviations, widened to have deviation ``std``
    then."""
    return jax.nn.initializers.truncated_normal(std / _TRUNCATED_STD)


def get_spec(param: nnx.Param) -> ParamSpec:
    """Returns the declaration behind a module's parameter."""
    return param.get_metadata("spec")


class ShardedWeight(NamedTuple):
    """A parameter for a program on shards, which gathers it and reduces its gradient
    itself."""

    value: jax.Array
    """The parameter in its storage layout."""
    compute_layout: Dims
    """The mesh axes of its dimensions in use; they begin those in storage."""
    gathered: jax.Array | None = None
    """The parameter in use, if it need not be gathered."""

    def move(self) -> jax.Array:
        """Returns the value in its compute layout; for small parameters, whose gradient
        may be reduced whole, and where there is no gradient."""
        return reshard(self.value, make_spec(self.compute_layout))


class PackedWeight(NamedTuple):
    """A matrix that is stored as several arrays, for a program on shards, which gathers
    these and multiplies with them as they are."""

    arrays: OperandArrays
    """In their storage layouts and dtypes."""
    operand: PackedOperand


StoredWeight = ShardedWeight | PackedWeight


@dataclass(frozen=True)
class ParamReader:
    """The way a layer reads one of its parameters."""

    spec: ParamSpec
    rules: AxisRules
    dtype: DTypeLike
    token_layout: Dims = ()
    """The mesh axes of B and S in the results, where the parameter is multiplied
    with."""
    product: LocalProduct | None = None
    """What the forward pass multiplies with; None: XLA's dot."""

    @property
    def input_axes(self) -> tuple[str | None, ...]:
        """Logical axes of a matrix's inputs, for one layer."""
        return tuple(self.spec.axes[d] for d in self.spec.contracting_dims)

    @property
    def output_axes(self) -> tuple[str | None, ...]:
        """Logical axes of a matrix's outputs, for one layer."""
        num_inputs = len(self.spec.contracting_dims)
        return self.spec.axes[self.spec.num_layer_axes + num_inputs :]

    def read(
        self, param: "jax.Array | Leaf", axes: tuple[str | None, ...] = ()
    ) -> ShardedWeight:
        """Reads an array, or a leaf's value, in ``dtype``: cast first, so that under
        ZeRO-3 the compute dtype crosses the wire. ``axes`` are its logical axes;
        default: the parameter's."""
        if isinstance(param, Leaf):
            reader = self
            if axes:
                reader = replace(self, spec=replace(self.spec, axes=axes))
            return param.materialize(reader)
        value = param.astype(self.dtype)
        # A scan takes the leading layer axis away: the last axes are the value's.
        value_axes = (axes or self.spec.axes)[-value.ndim :]
        compute_spec = self.rules.spec(*value_axes)
        compute_layout = parse_spec(compute_spec, value.ndim)
        stored_layout = get_layout(value)
        # Where each dimension's axes in use begin those in storage, the others are
        # gathered by the program that reads the weight.
        can_be_gathered = all(
            stored[: len(used)] == used
            for stored, used in zip(stored_layout, compute_layout, strict=True)
        )
        if not can_be_gathered:  # stored on other axes altogether
            value = reshard(value, compute_spec)
        return ShardedWeight(value, compute_layout)

    def read_kernel(
        self, param: "jax.Array | Leaf", axes: tuple[str | None, ...] = ()
    ) -> StoredWeight:
        """Reads an array as :meth:`read` does, or a leaf's kernel, to multiply with."""
        if isinstance(param, Leaf):
            return param.read_kernel(self)
        return self.read(param, axes)

    def multiply(self, x: jax.Array, *weights: StoredWeight) -> tuple[jax.Array, ...]:
        """Multiplies x [B, S, *inputs] by some matrices, in one program: [B, S,
        *outputs] each."""
        kernels: list[OperandArrays] = []
        gathered: list[OperandArrays | None] = []
        operands: list[MapOperand] = []
        for weight in weights:
            if isinstance(weight, PackedWeight):
                kernels.append(weight.arrays)
                gathered.append(None)
                operands.append(weight.operand)
            else:
                kernels.append({KERNEL: weight.value})
                whole = weight.gathered
                gathered.append(None if whole is None else {KERNEL: whole})
                operands.append(DenseOperand(weight.compute_layout, self.product))
        return multiply_kernels(
            x, tuple(kernels), tuple(gathered), tuple(operands), self.token_layout
        )


class RowReader(Protocol):
    """Reads the rows of the ids that are looked up."""

    def __call__(
        self,
        param: StoredParam,
        axes: tuple[str | None, ...] = (),
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        """Returns rows of a table, [..., S, columns].

        Args:
            axes: the table's logical axes; (): those of the parameter.
            dtype: of the rows; None: the compute dtype.
        """
        ...


class Leaf:
    """A parameter that is not stored as one array.

    A subclass is a frozen dataclass that is registered with JAX as a pytree. It stands
    in a tree of parameters where an array does, and holds arrays (or leaves again); in
    a tree of declarations the same class holds a :class:`ParamSpec` for each. An
    array's canonical name is the parameter's and the field's:
    ``layers.attention.query.kernel.lora_a``.
    """

    base_field: ClassVar[str | None] = None
    """The field that holds the parameter as a model without this leaf has it; None:
    there is none. Parameters of such a model are read into it."""

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        """Returns the parameter's value, as norms, tables, heads and experts read
        it."""
        raise NotImplementedError

    def read_kernel(self, reader: ParamReader) -> StoredWeight:
        """Returns what inputs are multiplied with, beside maps of the same input."""
        return self.materialize(reader)

    def prepare_input(self, x: jax.Array, reader: ParamReader) -> jax.Array:
        """Changes the map's input; then it is multiplied apart from maps of the same
        input."""
        return x

    def finish_product(
        self, y: jax.Array, x: jax.Array, reader: ParamReader
    ) -> jax.Array:
        """Completes the map of x, from the product y of x and :meth:`read_kernel`."""
        return y

    def finish_output(self, y: jax.Array, reader: ParamReader) -> jax.Array:
        """Changes the map's output y, its bias included."""
        return y

    def look_up(self, read_rows: "RowReader", reader: ParamReader) -> jax.Array:
        """Returns rows of a table."""
        return read_rows(self, ())

    def merge(self) -> jax.Array | None:
        """Returns the parameter as one fp32 array that a model without this leaf has,
        in the base's layout; None: no array computes the same."""
        return None

    def merge_bias(self, bias: jax.Array) -> jax.Array:
        """Returns the bias that belongs to the kernel of :meth:`merge`."""
        return bias

    def seed_dropout(self, specs: Self, key: jax.Array) -> Self:
        """Returns the leaf with random numbers of its own for one training step, if it
        drops something then; ``specs``: its declarations."""
        return self

    def seed_micro_batch(self, index: jax.Array) -> Self:
        """Returns one stage's part of a leaf of :meth:`seed_dropout` with other random
        numbers for each micro-batch ``index`` of a pipeline."""
        return self

    def replace_virtual(
        self, y: jax.Array, positions: jax.Array, reader: ParamReader
    ) -> jax.Array:
        """Puts a leaf's own vectors, if it has some, in place of those of virtual
        tokens: the first ``positions`` int [..., S] of y [..., S, *outputs], which a
        table or kernel gave."""
        return y


@dataclass(frozen=True)
class AdaptedParam(Leaf):
    """A parameter, and what an adapter has beside it."""

    base_field: ClassVar[str | None] = "base"

    base: StoredParam

    def read_kernel(self, reader: ParamReader) -> StoredWeight:
        return reader.read_kernel(self.base)


class PackedParam(Leaf):
    """A matrix that is stored as several arrays that stand for it, such as codes and
    scales, none of which is trained."""

    @property
    def dense_spec(self) -> ParamSpec:
        """The declaration of the array that it stands for."""
        raise NotImplementedError

    def from_dense(self, dense: jax.Array) -> Self:
        """Returns the leaf that stands for an array, or for the nearest that one can;
        called on the leaf of declarations, under ``jax.jit``."""
        raise NotImplementedError

    def merge(self) -> jax.Array:
        """Returns the array that it stands for, fp32."""
        raise NotImplementedError

    def stand_beside(self, others: "Sequence[Self]") -> "Self | None":
        """Returns one leaf for the kernels of several maps of the same input, this and
        others side by side along the outputs, each device with its own columns of all;
        None: they cannot stand so."""
        return None


def is_packed(param: StoredParam) -> bool:
    """Returns whether a stored parameter is arrays that stand for another."""
    return isinstance(param, PackedParam)


def is_leaf(param: StoredParam) -> bool:
    """Returns whether a stored parameter is not one array."""
    return isinstance(param, Leaf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatheredParam(Leaf):
    """A parameter that is kept whole too. ZeRO-2: the gradient is reduced straight to
    ``value``, the share it is kept for; ``whole`` is only read, and saves gathering
    it."""

    value: jax.Array
    whole: jax.Array

    def materialize(self, reader: ParamReader) -> ShardedWeight:
        weight = reader.read(self.value)
        whole = jax.lax.stop_gradient(self.whole).astype(reader.dtype)
        gathered = reshard(whole, make_spec(weight.compute_layout))
        return weight._replace(gathered=gathered)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UnstackedParam(Leaf):
    """A stack's parameter as one array (or leaf) a layer, as inference reads it."""

    layers: tuple[StoredParam, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedKernel(Leaf):
    """Several kernels of the same input side by side, in place of each of them
    (inference): one product reads them faster than several do. Each device has its own
    columns of all."""

    value: StoredParam
    """[in, outputs of all], or a leaf of that; None: it stands with the first of
    them."""

    def multiply(
        self, x: jax.Array, readers: "Sequence[ParamReader]"
    ) -> tuple[jax.Array, ...]:
        """Multiplies x [B, S, in] by the kernels; see :meth:`ParamReader.multiply`."""
        assert self.value is not None
        output_shapes = []
        output_layouts = []
        for reader in readers:
            layer_shape = reader.spec.shape[reader.spec.num_layer_axes :]
            output_shapes.append(layer_shape[1:])
            axes = reader.output_axes
            output_layouts.append(parse_spec(reader.rules.spec(*axes), len(axes)))
        kernel = self.value
        packed_product = None
        if isinstance(kernel, Leaf):
            weight = kernel.read_kernel(readers[0])
            assert isinstance(weight, PackedWeight)
            kernel = weight.arrays
            packed_product = weight.operand.product
        return multiply_fused_kernel(
            x,
            kernel,
            tuple(output_shapes),
            tuple(output_layouts),
            product=readers[0].product,
            packed_product=packed_product,
        )


def get_base(param: StoredParam) -> StoredParam:
    """Returns the base of a leaf that has one, or else the parameter itself."""
    if isinstance(param, Leaf) and param.base_field is not None:
        return getattr(param, param.base_field)
    return param


def get_dense_spec(stored: StoredParam) -> ParamSpec:
    """Returns the declaration of the array that a parameter's declaration stands for:
    that by which a model computes. It is the base of an adapted one."""
    base = get_base(stored)
    return base.dense_spec if isinstance(base, PackedParam) else base


def select_dense_specs(specs: Params) -> Params:
    """Returns declarations as a model names them whose parameters are all one array."""
    return jax.tree.map(get_dense_spec, specs, is_leaf=is_leaf)


def is_unstacked(params: Params) -> bool:
    """Returns whether a stack's parameters are held layer by layer."""
    leaves = jax.tree.leaves(params, is_leaf=is_leaf)
    return any(isinstance(leaf, UnstackedParam) for leaf in leaves)


def take_stacked_layer(params: Params, layer: int) -> Params:
    """Returns the parameters of one layer of a stack."""

    def take_layer(param: StoredParam) -> StoredParam:
        if isinstance(param, UnstackedParam):
            return param.layers[layer]
        return jax.tree.map(lambda x: x[layer], param)

    return jax.tree.map(take_layer, params, is_leaf=is_leaf)


def read_weight(param: nnx.Param, rules: AxisRules, dtype: DTypeLike) -> ShardedWeight:
    """Returns a parameter cast to ``dtype``, for ``maxlm.parallel``."""
    return ParamReader(get_spec(param), rules, dtype).read(param.get_value())


def materialize(param: nnx.Param, rules: AxisRules, dtype: DTypeLike) -> jax.Array:
    """Returns a parameter cast to ``dtype`` and moved as :meth:`ShardedWeight.move`
    says."""
    return read_weight(param, rules, dtype).move()


def replace_virtual(
    param: nnx.Param, y: jax.Array, positions: jax.Array, rules: AxisRules
) -> jax.Array:
    """Returns a parameter's result y in the compute dtype after
    :meth:`Leaf.replace_virtual`."""
    value = param.get_value()
    if not isinstance(value, Leaf):
        return y
    reader = ParamReader(get_spec(param), rules, y.dtype)
    return value.replace_virtual(y, positions, reader)


def stack_layers(module: ModuleT, num_layers: int, num_groups: int = 1) -> ModuleT:
    """Gives every parameter of ``module`` a leading ``layers`` axis of size
    ``num_layers``; for several groups of layers in a pipeline stage two, [groups,
    layers / groups], so that splitting the second gives each stage its share of every
    group."""
    lead_shape: tuple[int, ...] = (num_layers,)
    lead_axes: tuple[str | None, ...] = ("layers",)
    if num_groups > 1:
        lead_shape = (num_groups, num_layers // num_groups)
        lead_axes = (None, "layers")
    num_lead_dims = len(lead_shape)

    def declare_stacked(param: nnx.Param, spec: ParamSpec) -> nnx.Param:
        stacked = replace(
            spec,
            shape=(*lead_shape, *spec.shape),
            axes=(*lead_axes, *spec.axes),
            contracting_dims=tuple(
                dim + num_lead_dims for dim in spec.contracting_dims
            ),
        )
        return _declare_spec(stacked)

    return _map_params(module, param_specs(module), declare_stacked)


def param_specs(module: nnx.Module) -> Params:
    """Returns the declarations of all stored arrays, as a nested dict of
    :class:`ParamSpec` (or of leaves that hold some)."""
    return nnx.to_pure_dict(
        nnx.state(module),
        lambda param: param.get_metadata().get("stored", get_spec(param)),
    )


def bind_specs(module: ModuleT, specs: Params) -> ModuleT:
    """Returns the module with other leaves for its parameters; pure. ``specs`` are its
    :func:`param_specs`, some replaced by a :class:`Leaf` of declarations."""

    def declare_stored(param: nnx.Param, stored_spec: StoredParam) -> nnx.Param:
        return nnx.Param(param.get_value(), spec=get_spec(param), stored=stored_spec)

    return _map_params(module, specs, declare_stored)


def select_base_params(tree: Params) -> Params:
    """Returns parameters (or their declarations) as a model without adapted leaves
    names them: in place of each :class:`Leaf` that has one, its base."""
    return jax.tree.map(get_base, tree, is_leaf=is_leaf)


def replace_base_params(tree: Params, base: Params) -> Params:
    """Returns parameters with other values for what :func:`select_base_params`
    selects."""

    def put_base(param: StoredParam, base: StoredParam) -> StoredParam:
        if isinstance(param, Leaf) and param.base_field is not None:
            leaf = cast(AdaptedParam, param)  # a dataclass, as all leaves are
            return replace(leaf, **{param.base_field: base})
        return base

    return jax.tree.map(put_base, tree, base, is_leaf=is_leaf)


def merge_packed(params: Params) -> Params:
    """Returns parameters with the arrays that packed ones stand for, fp32."""

    def merge(param: StoredParam) -> StoredParam:
        return param.merge() if isinstance(param, PackedParam) else param

    return jax.tree.map(merge, params, is_leaf=is_packed)


def drop_auxiliary(tree: Params) -> Params:
    """Returns a run's parameters, or what stands in their place, without those of
    auxiliary models."""
    return {name: subtree for name, subtree in tree.items() if name != AUXILIARY}


def seed_dropout(params: Params, specs: Params, key: jax.Array) -> Params:
    """Returns parameters whose leaves drop what training drops, each by random numbers
    of its own name; ``specs``: their declarations."""

    def seed_leaf(
        path: jax.tree_util.KeyPath, spec: StoredParam, param: StoredParam
    ) -> StoredParam:
        if not is_leaf(spec):
            return param
        return param.seed_dropout(spec, fold_in_name(key, join_path(path)))

    return jax.tree_util.tree_map_with_path(seed_leaf, specs, params, is_leaf=is_leaf)


def seed_micro_batch(params: Params, index: jax.Array) -> Params:
    """Returns parameters with :meth:`Leaf.seed_micro_batch` of each leaf."""

    def seed_leaf(param: StoredParam) -> StoredParam:
        return param.seed_micro_batch(index) if is_leaf(param) else param

    return jax.tree.map(seed_leaf, params, is_leaf=is_leaf)


def get_values(module: nnx.Module) -> Params:
    """Returns the parameters of a bound module; the inverse of :func:`bind`."""
    return nnx.to_pure_dict(nnx.state(module))


def bind(module: ModuleT, params: Params) -> ModuleT:
    """Returns the module with values in place of its declarations; pure, ``module`` is
    unchanged.

    Of a stacked block's parameters, those of one layer make a block.
    """

    def set_value(param: nnx.Param, value: StoredParam) -> nnx.Param:
        return nnx.Param(value, **param.get_metadata())

    return _map_params(module, params, set_value)


def _map_params(
    module: ModuleT,
    tree: Params,
    function: Callable[[nnx.Param, StoredParam], nnx.Param],
) -> ModuleT:
    """Returns the module with ``function(parameter, the tree's value of its name)`` for
    each parameter; every value is used once."""
    graphdef, state = nnx.split(module)
    # Values may be trees themselves (leaves): only the nested dicts are names.
    values = flatten_names(tree, lambda value: not isinstance(value, Mapping))
    mapped = []
    for path, param in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        mapped.append((path, function(param, values.pop(name))))
    assert not values, f"the module has no parameter {next(iter(values))}"
    return nnx.merge(graphdef, nnx.from_flat_state(mapped))


def flatten_names(
    tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None
) -> dict[str, Any]:
    """Flattens a JAX tree to canonical names, ``{"layers.attention.query.kernel":
    ...}``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {join_path(path): value for path, value in flat}


def join_path(path: jax.tree_util.KeyPath) -> str:
    """Returns the canonical name of a leaf's path in a JAX tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """Folds a name into a key: each name has a stream of random numbers of its own."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def init_params(specs: Params, key: jax.Array) -> Params:
    """Makes initial values: each parameter's depend on ``key`` and its own name and
    layer alone. Pure; under ``maxlm.sharding.jit_sharded`` no parameter is ever whole
    on one device."""

    def init_param(path: jax.tree_util.KeyPath, spec: StoredParam) -> StoredParam:
        param_key = fold_in_name(key, join_path(path))
        if isinstance(spec, PackedParam):
            return _init_packed(spec, param_key)
        return _init_array(spec, param_key)

    return jax.tree_util.tree_map_with_path(init_param, specs, is_leaf=is_packed)


def _init_packed(spec: PackedParam, key: jax.Array) -> PackedParam:
    """Packs the initial values of the array that a parameter stands for, a layer after
    the other: all layers' may not fit beside what they become."""
    dense = spec.dense_spec
    num_layer_axes = dense.num_layer_axes
    if not num_layer_axes:
        return spec.from_dense(_init_array(dense, key))
    lead_shape = dense.shape[:num_layer_axes]
    layer_shape = dense.shape[num_layer_axes:]

    def init_layer(layer: jax.Array) -> PackedParam:
        layer_key = jax.random.fold_in(key, layer)
        values = dense.init(layer_key, layer_shape, dense.dtype)
        return spec.from_dense(values.reshape((1,) * num_layer_axes + layer_shape))

    layers = jax.lax.map(init_layer, jnp.arange(prod(lead_shape)))
    return jax.tree.map(
        lambda array: array.reshape(*lead_shape, *array.shape[1 + num_layer_axes :]),
        layers,
    )


def _init_array(spec: ParamSpec, key: jax.Array) -> jax.Array:
    """Makes a parameter's initial values by a key of its own."""
    if not spec.num_layer_axes:
        return spec.init(key, spec.shape, spec.dtype)
    if spec.layer_values is not None:
        return jnp.asarray(spec.layer_values, spec.dtype).reshape(spec.shape)
    # A key for each layer: its random numbers do not depend on the model's depth.
    num_layers = prod(spec.shape[: spec.num_layer_axes])
    layer_shape = spec.shape[spec.num_layer_axes :]
    fold_in_layer = jax.vmap(lambda layer: jax.random.fold_in(key, layer))
    layer_keys = fold_in_layer(jnp.arange(num_layers))
    init_layers = jax.vmap(
        lambda layer_key: spec.init(layer_key, layer_shape, spec.dtype)
    )
    return init_layers(layer_keys).reshape(spec.shape)
