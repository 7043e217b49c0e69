"""A run before any mesh, and the ways that one mesh, or very many, split it.

Everything that the plan's formulas read of a model is here: its parameters and their axes, which
matrices of a layer are multiplied together, and the sizes of what lies between them. Mesh sizes are
numbers or arrays of them, one element a candidate: every formula holds for both, so that the search
is the plan, many times over.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp

from maxlm.models.params import ParamSpec, named, param_specs
from maxlm.models.remat import SAVED, RematPolicy
from maxlm.run import RunConfig
from maxlm.sharding import AxisRules
from maxlm.train.optimizer import StateArray, described_opt_state, make_optimizer
from maxlm.train.schedule import make_schedule

Number = Any
"""A float, or an array of them with an element for every candidate."""
Reads = Literal["residual", "heads", "mlp"]


@dataclass(frozen=True)
class Kernel:
    """One matrix of a layer, or the output head."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int
    """Leading dimensions that are summed over; of an expert's, behind the first."""

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Map:
    """Matrices of one module that read the same input, in one program (``parallel/linear.py``)."""

    name: str
    kernels: tuple[Kernel, ...]
    reads: Reads
    writes: Reads
    experts: bool
    """Whether tokens choose among these, which lie in one array."""

    @property
    def size(self) -> int:
        return sum(kernel.size for kernel in self.kernels)


@dataclass(frozen=True)
class Work:
    """A run as costs are counted."""

    config: RunConfig
    dtype_bytes: int
    """Of the compute dtype."""
    specs: Mapping[str, ParamSpec]
    optimizer: tuple[StateArray, ...]

    @classmethod
    def of(cls, config: RunConfig, dtype: Any) -> "Work":
        """Nothing is allocated.

        Args:
            dtype: of the maths.
        """
        tree = param_specs(config.model.build(rules=AxisRules(), dtype=dtype))
        schedule = make_schedule(config.schedule, config.train.steps)
        state = described_opt_state(make_optimizer(config.optimizer, schedule, tree), tree)
        leaves = tuple(jax.tree.leaves(state))
        return cls(config, jnp.dtype(dtype).itemsize, named(tree), leaves)

    @property
    def layers(self) -> int:
        return self.config.model.num_layers

    @cached_property
    def layer_specs(self) -> dict[str, ParamSpec]:
        return {name: spec for name, spec in self.specs.items() if spec.lead}

    @cached_property
    def outer_specs(self) -> dict[str, ParamSpec]:
        """Of what is before the layers and after them."""
        return {name: spec for name, spec in self.specs.items() if not spec.lead}

    @cached_property
    def maps(self) -> tuple[Map, ...]:
        """The matrix products of a layer, in order of their names."""
        groups: dict[tuple[str, tuple[str | None, ...]], list[Kernel]] = {}
        for name, spec in self.layer_specs.items():
            if spec.role == "matrix":
                module = name.removesuffix(".kernel").rpartition(".")[0]
                groups.setdefault((module, _inputs(spec)), []).append(kernel_of(name, spec))
        return tuple(
            Map(
                name=f"{module.removeprefix('layers.')}: {', '.join(map(_short, kernels))}",
                kernels=tuple(kernels),
                reads=_side(inputs),
                writes=_side(kernels[0].axes[kernels[0].inputs + ("expert" in kernels[0].axes) :]),
                experts="expert" in kernels[0].axes,
            )
            for (module, inputs), kernels in groups.items()
        )

    @property
    def head(self) -> Kernel:
        """The output head [D, V], tied or not."""
        model = self.config.model
        return Kernel("head", (model.d_model, model.vocab_size), ("embed", "vocab"), 1)

    def recomputed(self, map_: Map, remat: RematPolicy) -> bool:
        """Whether the backward pass multiplies by these once more, for what it has not kept.

        The last map of a residual branch is needed for the branch after it alone.
        """
        if remat == "none" or map_.reads == "mlp":
            return False
        kept = SAVED[remat]
        if map_.writes == "mlp":
            return map_.experts or "mlp_up" not in kept
        return map_.writes == "residual" or "qkv" not in kept

    def attention_recomputed(self, remat: RematPolicy) -> bool:
        return remat != "none" and "attention" not in SAVED[remat]


def _inputs(spec: ParamSpec) -> tuple[str | None, ...]:
    return tuple(spec.axes[d] for d in spec.contract)


def kernel_of(name: str, spec: ParamSpec) -> Kernel:
    """A layer's own part of a stack of matrices."""
    return Kernel(name, spec.shape[spec.lead :], spec.axes[spec.lead :], len(spec.contract))


def _short(kernel: Kernel) -> str:
    return kernel.name.removesuffix(".kernel").rpartition(".")[2]


def _side(axes: Iterable[str | None]) -> Reads:
    axes = set(axes)
    if axes & {"heads", "kv_heads"}:
        return "heads"
    return "mlp" if "mlp" in axes else "residual"


@dataclass(frozen=True)
class Split:
    """How many ways a mesh, or each of many, splits what axis rules name."""

    config: RunConfig
    sizes: Mapping[str, Number]
    """Mesh axis → devices."""

    @cached_property
    def storage(self) -> AxisRules:
        return self.config.sharding.storage

    @cached_property
    def gradients(self) -> AxisRules:
        return self.config.sharding.gradients or self.storage

    @cached_property
    def optimizer(self) -> AxisRules:
        return self.config.sharding.optimizer or self.gradients

    @cached_property
    def compute(self) -> AxisRules:
        return self.config.sharding.compute

    def ways(self, mesh_axes: Iterable[str]) -> Number:
        """Devices along mesh axes together."""
        return prod((self.sizes[axis] for axis in dict.fromkeys(mesh_axes)), start=1.0)

    def shards(self, rules: AxisRules, axes: Iterable[str | None]) -> Number:
        """Distinct pieces of an array."""
        return self.ways(axis for logical in axes for axis in rules.mesh_axes(logical))

    def extra(self, rules: AxisRules, kernel: Kernel) -> tuple[str, ...]:
        """The mesh axes that split a kernel under rules and not in use."""
        used = {axis for logical in kernel.axes for axis in self.compute.mesh_axes(logical)}
        at_rest = (axis for logical in kernel.axes for axis in rules.mesh_axes(logical))
        return tuple(dict.fromkeys(axis for axis in at_rest if axis not in used))
