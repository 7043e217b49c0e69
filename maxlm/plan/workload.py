"""A run before any mesh, the ways that one mesh, or very many, split it, and what is
left of a step on one device.

Everything that the plan's formulas read of a model is here: its parameters and their
axes, its layers (``plan/stacks.py``), and what of them is computed twice. Mesh sizes
are numbers or arrays of them, one element a candidate: every formula holds for both, so
that the search is the plan, many times over.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.models.adapters import build_adapted_model
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.costs import AttentionCosts
from maxlm.models.params import (
    ParamSpec,
    flatten_names,
    param_specs,
    select_base_params,
)
from maxlm.models.remat import SAVED, RematPolicy
from maxlm.optim.optimizer import make_optimizer, opt_state_specs
from maxlm.optim.schedule import make_schedule
from maxlm.optim.state import select_trainable
from maxlm.plan.serving_cache import count_layer_caches, count_sequence_bytes
from maxlm.plan.stacks import AttentionShape, Kernel, MatmulGroup, Stack, make_kernel
from maxlm.plan.topology import Topology
from maxlm.run.config import RunConfig, list_base_models, read_frozen_configs
from maxlm.sharding import AxisRules
from maxlm.tasks.text import ClmTask

Number = Any
"""A float, or an array of them with an element for every candidate."""
FP32 = 4
"""Bytes of a number."""


class TokensPerRow(NamedTuple):
    """Tokens in a row of a batch, as the task makes them of ``data.seq_len`` of
    text."""

    decoder: int
    encoder: int
    """An encoder's, beside a decoder's own."""

    @property
    def encoder_tokens_per_decoder_token(self) -> float:
        return self.encoder / self.decoder


class RunWorkload:
    """A run as costs are counted: its model, task and optimizer for maths in ``dtype``;
    allocates nothing."""

    def __init__(self, config: RunConfig, dtype: Any):
        self.config = config
        self.tokens_per_row = rows = TokensPerRow(
            *config.task.row_lengths(config.data.seq_len)
        )
        self.dtype_bytes = jnp.dtype(dtype).itemsize
        """Bytes per element of the compute dtype."""
        model = build_adapted_model(
            config.model, config.adapter, rules=AxisRules(), dtype=dtype
        )
        tree = param_specs(model)
        self.specs = flatten_names(tree)
        self.base_specs = flatten_names(select_base_params(tree))
        """``specs`` without what an adapter adds, by which a step's computation is
        counted."""
        trained = select_trainable(tree, config.train.trainable)
        self.trained_names, self.trained_base_names = (
            frozenset(
                name for name, spec in flatten_names(specs).items() if spec is not None
            )
            for specs in (trained, select_base_params(trained))
        )
        """Names among ``specs``, and among ``base_specs``."""
        schedule = make_schedule(config.schedule, config.train.steps)
        optimizer = make_optimizer(config.optimizer, schedule, trained)
        self.optimizer: tuple[ParamSpec, ...] = tuple(
            jax.tree.leaves(opt_state_specs(optimizer, tree))
        )
        encoder_rate, trunks = (
            rows.encoder_tokens_per_decoder_token,
            config.model.trunks,
        )
        rates = {
            trunk.prefix: encoder_rate if trunk.is_encoder else 1.0 for trunk in trunks
        }
        self.embedding_lookup_rates = {
            name: tuple(rates[prefix] for prefix in prefixes)
            for name, prefixes in model.list_embedding_tables().items()
        }
        """Parameters in which rows are looked up, that of tokens first, with the tokens
        of every way it is read for each of the batch's."""
        bases = list_base_models(config)
        alone = {"task": ClmTask(), "data": config.data}
        self.frozen_models = {
            name: RunWorkload(run.model_copy(update=alone), dtype)
            for name, run in read_frozen_configs(config).items()
        }
        """Other models that the task reads, by name."""
        others = (
            own.specs for name, own in self.frozen_models.items() if name not in bases
        )
        self.frozen_specs = tuple(spec for specs in others for spec in specs.values())
        """Their parameters, but for an adapter's base."""
        cache = count_layer_caches(model) if isinstance(model, Decoder) else {}
        self.cache_bytes = round(count_sequence_bytes(cache, rows.decoder))
        """Caches of one row in generation, on all devices together; 0: the model does
        not generate."""
        stacks = (
            Stack(model, trunk, part, *rows, self.trained_base_names)
            for trunk in trunks
            for part in trunk.stacks
        )
        self.stacks = tuple(stacks)
        """Layers, in the order in which they are run."""
        sparse = [stack for stack in self.stacks if stack.experts]
        self.num_layers = sum(stack.num_layers for stack in self.stacks)
        self.num_expert_layers = sum(stack.num_layers for stack in sparse)
        self.experts = sparse[0].experts if sparse else None
        self.router = sparse[0].router if sparse else None
        counts = (
            Counter(dict.fromkeys(s.matmul_groups, s.num_layers)) for s in self.stacks
        )
        self.matmul_layer_counts = sum(counts, start=Counter[MatmulGroup]())
        """The matrix products of layers, by stack and in order of their names: layers
        of each."""
        shapes = (stack.attention_layer_counts for stack in self.stacks)
        self.attention_layer_counts = sum(shapes, start=Counter[AttentionShape]())
        """Shapes of attention, and the number of layers with each."""
        self.non_layer_specs = {
            n: s for n, s in self.specs.items() if not s.num_layer_axes
        }
        self.non_layer_kernels = tuple(
            make_kernel(name, spec, self.trained_base_names)
            for name, spec in self.base_specs.items()
            if spec.role == "matrix" and not spec.num_layer_axes
        )
        """Matrices behind the layers, but for the head."""
        tied = config.model.tie_embeddings
        size = (config.model.d_model, config.model.vocab_size)
        name = next(iter(self.embedding_lookup_rates)) if tied else "head.kernel"
        is_trained = name in self.trained_base_names
        self.head = Kernel("head", size, ("embed", "vocab"), 1, is_trained=is_trained)
        """The output head [D, V], tied or not."""

    def select_trained(self, specs: Mapping[str, ParamSpec]) -> list[ParamSpec]:
        return [spec for name, spec in specs.items() if name in self.trained_names]

    def is_kernel_recomputed(
        self, group: MatmulGroup, kernel: Kernel, remat: RematPolicy
    ) -> bool:
        """Whether the backward pass multiplies by a kernel again, for what it has not
        kept."""
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
        """Whether the backward pass needs what a residual branch, of which this is the
        last group, adds: for a norm behind it, or for the branch after it."""
        placement = self.config.model.placement
        return placement in ("sandwich", "post") or (
            placement == "pre" and group.branch != "ffn"
        )

    def is_parallel_to_attention(self, group: MatmulGroup) -> bool:
        """Whether a group's branch joins the stream with attention's, and has the same
        gradient."""
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


class MeshPartitioning:
    """Ways a mesh, or each of many, splits what axis rules name; ``sizes``: mesh axis →
    devices."""

    def __init__(self, config: RunConfig, sizes: Mapping[str, Number]):
        rules = config.sharding
        self.sizes = sizes
        self.storage, self.compute = rules.storage, rules.compute
        self.gradients = rules.gradients or rules.storage
        self.optimizer = rules.optimizer or self.gradients
        self.sequence_parallel = tuple(
            a for a in rules.compute.residual if a not in rules.compute.seq
        )
        """Mesh axes that split the residual stream's sequence, but not that within
        layers."""

    def num_devices(self, mesh_axes: Iterable[str]) -> Number:
        """Returns the number of devices along mesh axes together."""
        return prod((self.sizes[axis] for axis in dict.fromkeys(mesh_axes)), start=1.0)

    def num_shards(self, rules: AxisRules, axes: Iterable[str | None]) -> Number:
        """Counts the distinct pieces of an array."""
        return self.num_devices(
            axis for logical in axes for axis in rules.mesh_axes(logical)
        )

    def gather_axes(self, rules: AxisRules, kernel: Kernel) -> tuple[str, ...]:
        """Returns the mesh axes that split a kernel under rules and not in use."""
        used = {
            axis for logical in kernel.axes for axis in self.compute.mesh_axes(logical)
        }
        at_rest = (axis for logical in kernel.axes for axis in rules.mesh_axes(logical))
        return tuple(dict.fromkeys(axis for axis in at_rest if axis not in used))

    def local_bytes(self, rules: AxisRules, arrays: Iterable[ParamSpec]) -> Number:
        return sum(
            (a.nbytes / self.num_shards(rules, a.axes) for a in arrays), start=0.0
        )

    def local_attention_widths(
        self, heads: AttentionCosts | None
    ) -> LocalAttentionWidths:
        """Returns the sizes of one branch's heads on a device; without any, zeros."""
        if heads is None:
            return LocalAttentionWidths(0.0, 0.0, 0.0, 0.0, 0.0)
        own = heads.num_heads / self.num_devices(self.compute.heads)
        kv = heads.num_kv_heads / self.num_devices(
            self.compute.mesh_axes(heads.kv_axis)
        )
        size, value = heads.head_dim, heads.value_dim
        return LocalAttentionWidths(own * size, own * value, kv * size, kv * value, own)

    def local_ffn_elements_per_token(self, group: MatmulGroup) -> Number:
        """Elements a token that matrices write into the FFN's width on a device."""
        if group.output_features != "mlp":
            return 0.0
        return sum(
            k.shape[-1] / self.num_shards(self.compute, k.axes[-1:])
            for k in group.kernels
        )

    def local_non_residual_width(self, group: MatmulGroup) -> Number:
        """Elements a token that matrices write within their layer on a device."""
        return sum(
            prod(k.shape[k.num_input_dims :])
            / self.num_shards(self.compute, k.axes[k.num_input_dims :])
            for k in group.kernels
            if k.output_features != "residual"
        )


class StepShape:
    """A run on a mesh, or on many: a step's repetitions, and one micro-batch on one
    device.

    Args:
        sizes: mesh axis → devices.
        topology: whose kernels and collectives run the step; None: a machine's that
            exchanges any number of rows and has no kernel for attention.
    """

    def __init__(
        self,
        work: RunWorkload,
        sizes: Mapping[str, Number],
        micro_batches: Number,
        remat: RematPolicy,
        topology: Topology | None = None,
    ):
        self.work, self.split = work, MeshPartitioning(work.config, sizes)
        self.micro_batches = micro_batches
        self.remat: RematPolicy = remat
        platform = topology and topology.platform
        self.ragged = topology is None or topology.kind not in ("v5e", "cpu")
        """Whether the devices exchange as many rows as there are; otherwise blocks for
        the worst case (``parallel/dispatch.py: DroplessDispatch``)."""
        self.fused_attention = platform in ("tpu", "gpu")
        """Whether a kernel keeps attention's scores on the chip
        (``pallas_kernels/attention``), but of attention with learnt biases."""
        self.unordered_frozen_layers = platform == "gpu"
        """Whether the compiler has all branches of a layer with frozen kernels at once
        (XLA:GPU): it is gradients of kernels that put them in order
        (``parallel/linear.py``)."""
        split, parallel = self.split, work.config.parallel
        rules = split.compute
        batch = work.config.data.batch_size
        self.micro_batch_size = batch / micro_batches / split.num_devices(rules.batch)
        """Sequences of a micro-batch on a device."""
        tokens = self.micro_batch_size * work.tokens_per_row.decoder
        self.micro_batch_tokens = tokens / split.num_devices(rules.seq)
        """Tokens of a micro-batch on a device within layers."""
        self.residual_tokens = tokens / split.num_devices(rules.residual)
        """Tokens of a micro-batch on a device in the residual stream."""
        self.stages = split.num_devices(rules.layers)
        self.pipelined = np.greater(self.stages, 1)
        self.one_f_one_b = parallel.schedule == "1f1b"
        circular = parallel.schedule == "circular"
        self.layer_groups_per_stage = parallel.layer_groups if circular else 1
        self.layer_recomputes = np.where(self.pipelined, 1, 0) + (remat != "none")
        """Times that the backward pass runs layers as the forward pass did."""
        self.score_recomputes = np.where(
            self.pipelined, 1, 0
        ) + work.is_attention_recomputed(remat)
        """Times that the backward pass makes attention's scores as the forward pass
        did."""
        idle = (self.stages - 1) / self.layer_groups_per_stage
        passes = np.where(self.pipelined, micro_batches + idle, micro_batches)
        self.stage_passes_with_bubble = passes
        """Times that a stage passes all its layers, forward or backward, idle turns
        included: a device computes, and sends, in these too."""
        self.pipeline_iterations = passes * self.layer_groups_per_stage
        """Turns of a pipeline: of a stage, or of one of its groups of layers."""
        # Whether micro-batches lie spread over a pipeline's stages before layers and
        # after, and embedding and loss see all of a device's at once (GPipe, circular).
        spread = self.pipelined & (not self.one_f_one_b)
        shares = np.where(spread, micro_batches / self.stages, 1.0)
        self.embedding_loss_tokens = self.micro_batch_tokens * shares
        """Tokens that embedding and loss see at once on a device."""
        tokens = self.embedding_loss_tokens * self.residual_tokens
        self.embedding_loss_residual_tokens = tokens / self.micro_batch_tokens
        """Part of these that the device holds in the residual stream."""
        self.loss_calls = np.where(spread, 1.0, micro_batches)
        """Times that the loss runs: once, or for each micro-batch (under 1F1B on every
        stage)."""
        self.embedding_calls = np.where(spread, 1.0, passes)
        """Times that the embedding runs: once, or in each pass of a stage."""

    def gathered_weight_bytes(self, matrices: Kernel | MatmulGroup) -> Number:
        """Bytes of matrices as a device multiplies by them."""
        itemsize, split = self.work.dtype_bytes, self.split
        if isinstance(matrices, MatmulGroup):
            return sum(map(self.gathered_weight_bytes, matrices.kernels))
        return matrices.size * itemsize / split.num_shards(split.compute, matrices.axes)

    def per_stage(self, layers: Number) -> Number:
        return layers / self.stages

    @property
    def expert_rows_per_token(self) -> float:
        """Rows of a token that experts multiply, empty places of a capacity
        included."""
        experts = self.work.experts
        assert experts is not None
        return experts.experts_per_token * (experts.capacity_factor or 1.0)

    @property
    def expert_buffer_rows(self) -> Number:
        """Rows of the buffers that experts receive: room for the worst case, or their
        capacity."""
        experts = self.work.experts
        ways = self.split.num_devices(self.split.compute.expert)
        assert experts is not None
        if experts.capacity_factor is not None:
            return self.micro_batch_tokens * self.expert_rows_per_token
        own = experts.experts_per_token
        here = np.minimum(own, experts.num_experts / ways)
        return self.micro_batch_tokens * np.where(np.greater(ways, 1), ways * here, own)
