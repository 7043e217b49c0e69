"""A run before any mesh, and the ways that one mesh, or very many, split it.

Everything that the plan's formulas read of a model is here: its parameters and their axes, its
layers (``plan/stacks.py``), and what of them is computed twice. Mesh sizes are numbers or arrays of
them, one element a candidate: every formula holds for both, so that the search is the plan, many
times over.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.models.adapters import build_adapted_model
from maxlm.models.architectures import Model
from maxlm.models.costs import ExpertCosts
from maxlm.models.params import ParamSpec, flatten_names, param_specs, select_base
from maxlm.models.remat import SAVED, RematPolicy
from maxlm.plan.stacks import (
    Kernel,
    Map,
    Pairs,
    Stack,
    list_stacks,
    make_kernel,
    merge_maps,
    merge_pairs,
)
from maxlm.run import RunConfig, read_frozen_configs
from maxlm.sharding import AxisRules
from maxlm.train.optimizer import StateArray, described_opt_state, make_optimizer
from maxlm.train.schedule import make_schedule
from maxlm.train.trainable import select_trainable

Number = Any
"""A float, or an array of them with an element for every candidate."""


class TokensPerRow(NamedTuple):
    """Tokens in a row of a batch, as the task makes them of ``data.seq_len`` of text."""

    own: int
    inputs: int
    """An encoder's, beside a decoder's own."""

    @classmethod
    def of(cls, config: RunConfig) -> "TokensPerRow":
        return cls(*config.task.row_lengths(config.data.seq_len))


@dataclass(frozen=True)
class RunWorkload:
    """A run as costs are counted."""

    config: RunConfig
    dtype_bytes: int
    """Of the compute dtype."""
    specs: Mapping[str, ParamSpec]
    base_specs: Mapping[str, ParamSpec]
    """The same without what an adapter adds: what a step computes is counted of these."""
    stacks: tuple[Stack, ...]
    """Layers, in the order in which they are run."""
    tables: Mapping[str, tuple[float, ...]]
    """Parameters in which rows are looked up, that of tokens first; each with the tokens of every
    way it is read for each of the batch's."""
    optimizer: tuple[StateArray, ...]
    trained: frozenset[str]
    """The names of the parameters that are trained."""
    frozen: tuple[ParamSpec, ...] = ()
    """The parameters of other models that the task reads."""

    @classmethod
    def of(cls, config: RunConfig, dtype: Any) -> "RunWorkload":
        """Nothing is allocated.

        Args:
            dtype: of the maths.
        """

        def build(run: RunConfig) -> Model:
            how: dict[str, Any] = {"rules": AxisRules(), "dtype": dtype}
            return build_adapted_model(run.model, run.adapter, **how)

        model = build(config)
        tree, rows = param_specs(model), TokensPerRow.of(config)
        stacks, inputs = list_stacks(model, *rows), rows.inputs / rows.own
        rates = {t.prefix: inputs if t.is_encoder else 1.0 for t in config.model.trunks}
        tables = {
            name: tuple(rates[prefix] for prefix in trunks)
            for name, trunks in model.list_lookups().items()
        }
        schedule = make_schedule(config.schedule, config.train.steps)
        trained = select_trainable(tree, config.train.trainable)
        state = described_opt_state(make_optimizer(config.optimizer, schedule, trained), tree)
        leaves = tuple(jax.tree.leaves(state))
        frozen = tuple(
            spec
            for run in read_frozen_configs(config).values()
            for spec in jax.tree.leaves(param_specs(build(run)))
        )
        names = frozenset(name for name, s in flatten_names(trained).items() if s is not None)
        size, base = jnp.dtype(dtype).itemsize, flatten_names(select_base(tree))
        flat = flatten_names(tree)
        return cls(config, size, flat, base, stacks, tables, leaves, names, frozen)

    @cached_property
    def rows(self) -> TokensPerRow:
        return TokensPerRow.of(self.config)

    @property
    def layers(self) -> int:
        return sum(stack.depth for stack in self.stacks)

    @property
    def experts(self) -> ExpertCosts | None:
        """The experts of layers that have some."""
        return next((stack.experts for stack in self.stacks if stack.experts), None)

    @property
    def router(self) -> Kernel | None:
        """A layer's router."""
        return next((stack.router for stack in self.stacks if stack.router), None)

    @property
    def expert_layers(self) -> int:
        return sum(stack.depth for stack in self.stacks if stack.experts)

    @property
    def encoder_rate(self) -> float:
        """Tokens of an encoder beside the decoder for each of the decoder's; without one, 0."""
        return max((stack.rate for stack in self.stacks if stack.is_encoder), default=0.0)

    @cached_property
    def layer_specs(self) -> dict[str, ParamSpec]:
        return {name: spec for name, spec in self.specs.items() if spec.lead}

    @cached_property
    def outer_specs(self) -> dict[str, ParamSpec]:
        """Parameters before the layers and after them."""
        return {name: spec for name, spec in self.specs.items() if not spec.lead}

    def select_trained(self, specs: Mapping[str, ParamSpec]) -> list[ParamSpec]:
        """Return those of some parameters that are trained."""
        return [spec for name, spec in specs.items() if name in self.trained]

    @cached_property
    def maps(self) -> tuple[Map, ...]:
        """The matrix products of layers, by stack and in order of their names."""
        return merge_maps(map_ for stack in self.stacks for map_ in stack.maps)

    @cached_property
    def pairs(self) -> tuple[Pairs, ...]:
        """Whom tokens look at, in how many layers."""
        return merge_pairs(pairs for stack in self.stacks for pairs in stack.pairs)

    @cached_property
    def outer_kernels(self) -> tuple[Kernel, ...]:
        """Matrices behind the layers, but for the head."""
        specs = self.base_specs.items()
        matrices = {name: s for name, s in specs if s.role == "matrix" and not s.lead}
        return tuple(make_kernel(name, spec) for name, spec in matrices.items())

    @property
    def head(self) -> Kernel:
        """The output head [D, V], tied or not."""
        model = self.config.model
        return Kernel("head", (model.d_model, model.vocab_size), ("embed", "vocab"), 1)

    def recomputed(self, map_: Map, kernel: Kernel, remat: RematPolicy) -> bool:
        """Whether the backward pass multiplies by a kernel once more, for what it has not kept."""
        if remat == "none":
            return False
        kept = SAVED[remat]
        if kernel.writes == "residual":
            return self.ends_wanted(map_)
        if kernel.writes == "mlp":
            return map_.experts or map_.branch != "ffn" or "mlp_up" not in kept
        if kernel.writes == "latent":
            return True  # for what is made of it next
        return "qkv" not in kept or kernel.needed_raw

    def ends_wanted(self, map_: Map) -> bool:
        """Whether the backward pass wants what a residual branch adds, of which this is the last
        map: for a norm behind it, or for the branch after it."""
        placement = self.config.model.placement
        return placement in ("sandwich", "post") or (placement == "pre" and map_.branch != "ffn")

    def beside_attention(self, map_: Map) -> bool:
        """Whether a map's branch is added to the stream together with attention's: what it adds
        has the same gradient."""
        beside = self.config.model.placement in ("parallel", "parallel_shared")
        return beside and map_.branch == "ffn"

    def attention_recomputed(self, remat: RematPolicy) -> bool:
        return remat != "none" and "attention" not in SAVED[remat]


@dataclass(frozen=True)
class MeshSplit:
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
