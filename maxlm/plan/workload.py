"""A run before any mesh, and the ways that one mesh, or very many, split it.

Everything that the plan's formulas read of a model is here: its parameters and their axes, its
layers (``plan/stacks.py``), and what of them is computed twice. Mesh sizes are numbers or arrays of
them, one element a candidate: every formula holds for both, so that the search is the plan, many
times over.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.models.adapters import build_adapted_model
from maxlm.models.architectures import Decoder
from maxlm.models.costs import AttentionCosts, ExpertCosts
from maxlm.models.params import ParamSpec, flatten_names, param_specs, select_base_params
from maxlm.models.remat import SAVED, RematPolicy
from maxlm.plan.serving_cache import count_layer_caches, count_sequence_bytes
from maxlm.plan.stacks import AttentionShape, Kernel, MatmulGroup, Stack, list_stacks, make_kernel
from maxlm.run import RunConfig, list_base_models, read_frozen_configs
from maxlm.sharding import AxisRules
from maxlm.tasks.text import ClmTask
from maxlm.train.optimizer import OptStateSpec, make_optimizer, make_schedule, opt_state_specs
from maxlm.train.trainable import select_trainable

Number = Any
"""A float, or an array of them with an element for every candidate."""
FP32 = 4
"""Bytes of a number."""


class TokensPerRow(NamedTuple):
    """Tokens in a row of a batch, as the task makes them of ``data.seq_len`` of text."""

    decoder: int
    encoder: int
    """An encoder's, beside a decoder's own."""

    @property
    def encoder_tokens_per_decoder_token(self) -> float:
        """Tokens of an encoder for each of the decoder's."""
        return self.encoder / self.decoder


@dataclass(frozen=True)
class RunWorkload:
    """A run as costs are counted."""

    config: RunConfig
    tokens_per_row: TokensPerRow
    dtype_bytes: int
    """Bytes per element of the compute dtype."""
    specs: Mapping[str, ParamSpec]
    base_specs: Mapping[str, ParamSpec]
    """``specs`` without what an adapter adds, by which a step's computation is counted."""
    stacks: tuple[Stack, ...]
    """Layers, in the order in which they are run."""
    embedding_lookup_rates: Mapping[str, tuple[float, ...]]
    """Parameters in which rows are looked up, that of tokens first, with the tokens of every way it
    is read for each of the batch's."""
    optimizer: tuple[OptStateSpec, ...]
    trained_names: frozenset[str]
    """Names among ``specs``."""
    trained_base_names: frozenset[str]
    """Names among ``base_specs``."""
    frozen_models: Mapping[str, "RunWorkload"] = field(default_factory=dict)
    """Other models that the task reads, by name."""
    frozen_specs: tuple[ParamSpec, ...] = ()
    """Their parameters, but for an adapter's base."""
    cache_bytes: int = 0
    """Caches of one row in generation, on all devices together; 0: the model does not generate."""

    @classmethod
    def from_config(cls, config: RunConfig, dtype: Any) -> "RunWorkload":
        """Reads a run's model, task and optimizer for maths in ``dtype``; allocates nothing."""
        parts = config.model, config.adapter
        model = build_adapted_model(*parts, rules=AxisRules(), dtype=dtype)
        rows = TokensPerRow(*config.task.row_lengths(config.data.seq_len))
        tree = param_specs(model)
        encoder_rate, trunks = rows.encoder_tokens_per_decoder_token, config.model.trunks
        rates = {trunk.prefix: encoder_rate if trunk.is_encoder else 1.0 for trunk in trunks}
        trained = select_trainable(tree, config.train.trainable)
        trained_names, trained_base = (
            {name for name, spec in flatten_names(specs).items() if spec is not None}
            for specs in (trained, select_base_params(trained))
        )
        schedule = make_schedule(config.schedule, config.train.steps)
        optimizer = make_optimizer(config.optimizer, schedule, trained)
        bases, alone = list_base_models(config), {"task": ClmTask(), "data": config.data}
        frozen = {
            name: cls.from_config(run.model_copy(update=alone), dtype)
            for name, run in read_frozen_configs(config).items()
        }
        others = (own.specs for name, own in frozen.items() if name not in bases)
        cache = count_layer_caches(model) if isinstance(model, Decoder) else {}
        return cls(
            config=config,
            tokens_per_row=rows,
            dtype_bytes=jnp.dtype(dtype).itemsize,
            specs=flatten_names(tree),
            base_specs=flatten_names(select_base_params(tree)),
            stacks=tuple(list_stacks(model, *rows, trained_base)),
            embedding_lookup_rates={
                name: tuple(rates[prefix] for prefix in prefixes)
                for name, prefixes in model.list_embedding_tables().items()
            },
            optimizer=tuple(jax.tree.leaves(opt_state_specs(optimizer, tree))),
            trained_names=frozenset(trained_names),
            trained_base_names=frozenset(trained_base),
            frozen_models=frozen,
            frozen_specs=tuple(spec for specs in others for spec in specs.values()),
            cache_bytes=round(count_sequence_bytes(cache, rows.decoder)),
        )

    @property
    def num_layers(self) -> int:
        return sum(stack.num_layers for stack in self.stacks)

    @property
    def experts(self) -> ExpertCosts | None:
        return next((stack.experts for stack in self.stacks if stack.experts), None)

    @property
    def router(self) -> Kernel | None:
        return next((stack.router for stack in self.stacks if stack.router), None)

    @property
    def num_expert_layers(self) -> int:
        return sum(stack.num_layers for stack in self.stacks if stack.experts)

    @cached_property
    def non_layer_specs(self) -> dict[str, ParamSpec]:
        return {name: spec for name, spec in self.specs.items() if not spec.num_layer_axes}

    def select_trained(self, specs: Mapping[str, ParamSpec]) -> list[ParamSpec]:
        return [spec for name, spec in specs.items() if name in self.trained_names]

    @cached_property
    def matmul_layer_counts(self) -> Counter[MatmulGroup]:
        """The matrix products of layers, by stack and in order of their names: layers of each."""
        own = (Counter(dict.fromkeys(s.matmul_groups, s.num_layers)) for s in self.stacks)
        return sum(own, start=Counter[MatmulGroup]())

    @cached_property
    def attention_layer_counts(self) -> Counter[AttentionShape]:
        """Shapes of attention, and the number of layers with each."""
        own = (stack.attention_layer_counts for stack in self.stacks)
        return sum(own, start=Counter[AttentionShape]())

    @cached_property
    def non_layer_kernels(self) -> tuple[Kernel, ...]:
        """Matrices behind the layers, but for the head."""
        specs = self.base_specs.items()
        matrices = {name: s for name, s in specs if s.role == "matrix" and not s.num_layer_axes}
        return tuple(make_kernel(n, s, self.trained_base_names) for n, s in matrices.items())

    @property
    def head(self) -> Kernel:
        """The output head [D, V], tied or not."""
        model = self.config.model
        name = next(iter(self.embedding_lookup_rates)) if model.tie_embeddings else "head.kernel"
        shape, axes = (model.d_model, model.vocab_size), ("embed", "vocab")
        return Kernel("head", shape, axes, 1, is_trained=name in self.trained_base_names)

    def is_kernel_recomputed(self, group: MatmulGroup, kernel: Kernel, remat: RematPolicy) -> bool:
        """Whether the backward pass multiplies by a kernel again, for what it has not kept."""
        if remat == "none":
            return False
        kept = SAVED[remat]
        return {
            "residual": self.backward_needs_branch_output(group),
            "mlp": group.has_experts or group.branch != "ffn" or "mlp_up" not in kept,
            "latent": True,  # for what is made of it next
            "heads": "qkv" not in kept or kernel.needs_raw_output,
        }[kernel.output_features]

    def backward_needs_branch_output(self, group: MatmulGroup) -> bool:
        """Whether the backward pass needs what a residual branch, of which this is the last group,
        adds: for a norm behind it, or for the branch after it."""
        placement = self.config.model.placement
        return placement in ("sandwich", "post") or (placement == "pre" and group.branch != "ffn")

    def is_parallel_to_attention(self, group: MatmulGroup) -> bool:
        """Whether a group's branch is added to the stream together with attention's: what it adds
        has the same gradient."""
        beside = self.config.model.placement in ("parallel", "parallel_shared")
        return beside and group.branch == "ffn"

    def is_attention_recomputed(self, remat: RematPolicy) -> bool:
        return remat != "none" and "attention" not in SAVED[remat]


class LocalAttentionWidths(NamedTuple):
    """Elements a token of attention's arrays."""

    queries: Number
    output: Number
    keys: Number
    values: Number
    heads: Number
    """Query heads, and log-sum-exps."""


@dataclass(frozen=True)
class MeshPartitioning:
    """Ways that a mesh, or each of many, splits what axis rules name."""

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

    @cached_property
    def sequence_parallel(self) -> tuple[str, ...]:
        """Mesh axes that split the residual stream's sequence, but not that within layers."""
        return tuple(a for a in self.compute.residual if a not in self.compute.seq)

    def num_devices(self, mesh_axes: Iterable[str]) -> Number:
        """Returns the number of devices along mesh axes together."""
        return prod((self.sizes[axis] for axis in dict.fromkeys(mesh_axes)), start=1.0)

    def num_shards(self, rules: AxisRules, axes: Iterable[str | None]) -> Number:
        """Counts the distinct pieces of an array."""
        return self.num_devices(axis for logical in axes for axis in rules.mesh_axes(logical))

    def gather_axes(self, rules: AxisRules, kernel: Kernel) -> tuple[str, ...]:
        """Returns the mesh axes that split a kernel under rules and not in use."""
        used = {axis for logical in kernel.axes for axis in self.compute.mesh_axes(logical)}
        at_rest = (axis for logical in kernel.axes for axis in rules.mesh_axes(logical))
        return tuple(dict.fromkeys(axis for axis in at_rest if axis not in used))

    def local_bytes(self, rules: AxisRules, arrays: Iterable[ParamSpec | OptStateSpec]) -> Number:
        return sum((a.nbytes / self.num_shards(rules, a.axes) for a in arrays), start=0.0)

    def local_attention_widths(self, heads: AttentionCosts | None) -> LocalAttentionWidths:
        """Returns the sizes of one branch's heads on a device; without any, zeros."""
        if heads is None:
            return LocalAttentionWidths(0.0, 0.0, 0.0, 0.0, 0.0)
        own = heads.num_heads / self.num_devices(self.compute.heads)
        kv = heads.num_kv_heads / self.num_devices(self.compute.mesh_axes(heads.kv_axis))
        size, value = heads.head_dim, heads.value_dim
        return LocalAttentionWidths(own * size, own * value, kv * size, kv * value, own)

    def local_ffn_elements_per_token(self, group: MatmulGroup) -> Number:
        """Elements a token that matrices write into the FFN's width on a device."""
        if group.output_features != "mlp":
            return 0.0
        return sum(k.shape[-1] / self.num_shards(self.compute, k.axes[-1:]) for k in group.kernels)

    def local_non_residual_width(self, group: MatmulGroup) -> Number:
        """Elements a token that matrices write within their layer on a device."""
        return sum(
            prod(k.shape[k.num_input_dims :])
            / self.num_shards(self.compute, k.axes[k.num_input_dims :])
            for k in group.kernels
            if k.output_features != "residual"
        )
