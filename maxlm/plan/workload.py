"""The plan's inputs: a run before any mesh (``RunWorkload``), the ways that one mesh, or
very many, split it (``MeshPartitioning``), and a step on one device (``StepShape``).

Everything that the plan's formulas read of a model is here: its parameters and their
axes, its layers (``plan/stacks.py``), and what of them is computed twice. Mesh sizes
are numbers or arrays of them, one element a candidate: every formula holds for both, so
that the search is the plan, many times over.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from maxlm.config.load import load_config
from maxlm.models.architectures import Model
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.costs import AttentionCosts
from maxlm.models.frontends import get_frontend_costs
from maxlm.models.params import (
    SHARED_BLOCKS,
    Params,
    ParamSpec,
    flatten_names,
    param_specs,
    select_base_params,
    select_dense_specs,
)
from maxlm.models.remat import SAVED, RematPolicy
from maxlm.models.transforms import build_transformed_model
from maxlm.optim.optimizer import make_optimizer, opt_state_specs
from maxlm.optim.schedule import make_schedule
from maxlm.optim.state import select_trainable
from maxlm.plan.serving_cache import count_layer_caches, count_sequence_bytes
from maxlm.plan.stacks import (
    AttentionShape,
    Kernel,
    MatmulGroup,
    StackCosts,
    make_kernel,
)
from maxlm.plan.topology import Topology
from maxlm.run.config import (
    RunConfig,
    list_base_models,
    read_auxiliary_configs,
    read_frozen_configs,
)
from maxlm.sharding import AxisRules, MeshConfig, mesh_sizes
from maxlm.sharding.mesh import count_min_devices
from maxlm.tasks.text import ClmTask

Number = Any
"""A float, or an array of them with an element for every candidate."""
FP32 = 4
FRONTEND_PREFIX = "frontend."
"""Begins the names of a frontend's parameters."""
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


class FrontendWorkload(NamedTuple):
    """A frontend as costs are counted. A row of a batch has room for the same number of
    items whether it has so many or not, and they are computed alike."""

    kernels: tuple[Kernel, ...]
    rows_per_token: float
    """Rows that each of these multiplies, for each token of the batch."""
    extra_flops_per_token: float
    """Forward FLOPs beside matrices, likewise."""


class ScoringWorkload(NamedTuple):
    """A model that scores what a run generates."""

    work: "RunWorkload"
    mesh: MeshConfig | None
    """The devices that it is spread over; None: one."""
    is_stand_in: bool
    """Whether its run is not there yet, and the run's own model is counted in its
    place."""

    def count_sizes(self, sizes: Mapping[str, Number]) -> dict[str, int]:
        """Returns the mesh that it lies on; ``sizes``: of the run's own."""
        if self.mesh is None:
            return dict.fromkeys(sizes, 1)
        num_devices = count_min_devices(self.mesh)
        if -1 in self.mesh.model_dump().values():
            num_devices = int(np.max(prod(sizes.values())))
        return mesh_sizes(self.mesh, num_devices)

    def count_param_bytes(self, sizes: Mapping[str, Number]) -> float:
        """Counts the bytes of its parameters on a device that has it."""
        split = MeshPartitioning(self.work.config, self.count_sizes(sizes))
        return float(split.local_bytes(split.storage, self.work.specs.values()))


class RunWorkload:
    """A run as costs are counted: its model, task and optimizer for maths in ``dtype``;
    allocates nothing."""

    def __init__(self, config: RunConfig, dtype: DTypeLike):
        self.config = config
        decoder_tokens, encoder_tokens = config.task.row_lengths(config.data.seq_len)
        self.tokens_per_row = TokensPerRow(decoder_tokens, encoder_tokens)
        self.dtype_bytes = jnp.dtype(dtype).itemsize
        """Bytes per element of the compute dtype."""
        model = build_transformed_model(
            config.model, config.transforms, rules=AxisRules(), dtype=dtype
        )
        self._read_parameters(model)
        self._read_embeddings(model)
        self._read_frozen_models(dtype)
        self._read_scoring_models(dtype)
        self._read_auxiliary_models(dtype)
        self.cache_bytes = self._count_cache_bytes(model)
        """Caches of one row in generation, on all devices together; 0: the model does
        not generate."""
        self._read_stacks(model)

    def _read_parameters(self, model: Model) -> None:
        config = self.config
        tree = param_specs(model)
        self.specs = flatten_names(tree)
        self.base_specs = flatten_names(select_dense_specs(tree))
        """``specs`` without what an adapter adds, by which a step's computation is
        counted."""
        trained = select_trainable(tree, config.train.trainable)
        self.trained_names = _list_declared_names(trained)
        """Names among ``specs``."""
        self.trained_base_names = _list_declared_names(select_base_params(trained))
        """Names among ``base_specs``."""
        schedule = make_schedule(config.schedule, config.train.steps)
        optimizer = make_optimizer(config.optimizer, schedule, trained)
        state = opt_state_specs(optimizer, tree)
        self.optimizer: tuple[ParamSpec, ...] = tuple(jax.tree.leaves(state))
        """Arrays of the optimizer's state."""
        self.non_layer_specs = {
            name: spec
            for name, spec in self.specs.items()
            if not spec.num_layer_axes or name.startswith(FRONTEND_PREFIX)
        }
        self.non_layer_kernels = tuple(
            make_kernel(name, spec, self.trained_base_names)
            for name, spec in self.base_specs.items()
            if spec.role == "matrix"
            and not spec.num_layer_axes
            and not name.startswith((FRONTEND_PREFIX, f"{SHARED_BLOCKS}."))
        )
        """Matrices behind the layers, but for the head."""
        self.frontend = self._read_frontend(model)
        """Costs of the frontend; None: the model has none, or the task no inputs for
        it."""

    def _read_frontend(self, model: Model) -> "FrontendWorkload | None":
        config = self.config.model.frontend
        if config is None or not self.config.task.reads_frontend:
            return None
        row_tokens = self.tokens_per_row.decoder
        items_per_token = config.count_items_per_row(row_tokens) / row_tokens
        assert model.frontend is not None
        costs = get_frontend_costs(model.frontend, config)
        # A stack's kernel stands for that of each of its layers.
        kernels: list[Kernel] = []
        for name, spec in self.base_specs.items():
            if spec.role == "matrix" and name.startswith(FRONTEND_PREFIX):
                num_layers = prod(spec.shape[: spec.num_layer_axes])
                kernel = make_kernel(name, spec, self.trained_base_names)
                kernels += [kernel] * num_layers
        return FrontendWorkload(
            kernels=tuple(kernels),
            rows_per_token=items_per_token * costs.rows_per_item,
            extra_flops_per_token=items_per_token * costs.extra_flops,
        )

    def _read_embeddings(self, model: Model) -> None:
        config = self.config.model
        encoder_rate = self.tokens_per_row.encoder_tokens_per_decoder_token
        rate_of_trunk = {
            trunk.prefix: encoder_rate if trunk.is_encoder else 1.0
            for trunk in config.trunks
        }
        self.embedding_lookup_rates = {
            name: tuple(rate_of_trunk[prefix] for prefix in prefixes)
            for name, prefixes in model.list_embedding_tables().items()
        }
        """Parameters in which rows are looked up, that of tokens first, with the tokens
        of every way it is read for each of the batch's."""
        if config.mtp is not None:
            # Each module looks its tokens up, too.
            token_table = next(iter(self.embedding_lookup_rates))
            self.embedding_lookup_rates[token_table] += (1.0,) * config.mtp.num_modules
        head_parameter = "head.kernel"
        if config.tie_embeddings:
            head_parameter = next(iter(self.embedding_lookup_rates))
        self.head = Kernel(
            name="head",
            shape=(config.d_model, config.vocab_size),
            axes=("embed", "vocab"),
            num_input_dims=1,
            is_trained=head_parameter in self.trained_base_names,
        )
        """The output head [D, V], tied or not."""
        num_ahead = 0 if config.mtp is None else config.mtp.num_modules
        self.head_passes = 1 + num_ahead
        """Times that each token's logits are made: of the next token, and of each that
        is predicted further ahead."""

    def _read_frozen_models(self, dtype: DTypeLike) -> None:
        config = self.config
        # A frozen model has no task of its own: it reads the run's batches.
        without_task = {"task": ClmTask(), "data": config.data}
        self.frozen_models = {
            name: RunWorkload(run.model_copy(update=without_task), dtype)
            for name, run in read_frozen_configs(config).items()
        }
        """Other models that the task reads, by name."""
        sharing_base = list_base_models(config)
        self.frozen_specs = tuple(
            spec
            for name, model in self.frozen_models.items()
            if name not in sharing_base
            for spec in model.specs.values()
        )
        """Their parameters, but for an adapter's base."""

    def _read_scoring_models(self, dtype: DTypeLike) -> None:
        self.scoring_models: dict[str, ScoringWorkload] = {}
        """Models that score what the task generates, by name."""
        config = self.config
        for name, model in config.task.scoring_models().items():
            path = Path(model.run) / "config.yaml"
            run = load_config(RunConfig, path).value if path.exists() else config
            # Adapters are merged where a run is loaded to be used.
            updates = {"task": ClmTask(), "data": config.data, "adapter": None}
            work = RunWorkload(run.model_copy(update=updates), dtype)
            is_stand_in = not path.exists()
            self.scoring_models[name] = ScoringWorkload(work, model.mesh, is_stand_in)

    def _read_auxiliary_models(self, dtype: DTypeLike) -> None:
        config = self.config
        # All of them is trained, on the run's batches.
        train = config.train.model_copy(update={"trainable": None})
        updates = {"task": ClmTask(), "adapter": None, "train": train}
        self.auxiliary_models = {
            name: RunWorkload(
                config.model_copy(update=updates | {"model": model}), dtype
            )
            for name, model in read_auxiliary_configs(config).items()
        }
        """Models that are trained beside the run's own, by name."""

    def _count_cache_bytes(self, model: Model) -> int:
        if not isinstance(model, Decoder):
            return 0
        caches = count_layer_caches(model)
        return round(count_sequence_bytes(caches, self.tokens_per_row.decoder))

    def _read_stacks(self, model: Model) -> None:
        self.stacks = tuple(
            StackCosts(
                model,
                trunk,
                run,
                part,
                self.tokens_per_row.decoder,
                self.tokens_per_row.encoder,
                self.trained_base_names,
            )
            for trunk in self.config.model.trunks
            for run in trunk.runs
            for part in run.stacks
        )
        """Layers, in the order in which they are run."""
        self.shared_readers: Counter[str] = Counter()
        """Modules whose weights several layers share, and the layers that read each."""
        for stack in self.stacks:
            for name in stack.shared_names:
                self.shared_readers[name] += stack.num_layers
        with_experts = [stack for stack in self.stacks if stack.experts]
        self.num_layers = sum(stack.num_layers for stack in self.stacks)
        self.num_expert_layers = sum(stack.num_layers for stack in with_experts)
        # All layers with experts have the same: a config has one `model.moe`.
        self.experts = with_experts[0].experts if with_experts else None
        self.router = with_experts[0].router if with_experts else None
        self.matmul_layer_counts: Counter[MatmulGroup] = Counter()
        """The matrix products of layers, by stack and in order of their names: layers
        of each."""
        self.attention_layer_counts: Counter[AttentionShape] = Counter()
        """Shapes of attention, and the number of layers with each."""
        for stack in self.stacks:
            for group in dict.fromkeys(stack.matmul_groups):
                self.matmul_layer_counts[group] += stack.num_layers
            self.attention_layer_counts += stack.attention_layer_counts

    def select_trained(self, specs: Mapping[str, ParamSpec]) -> list[ParamSpec]:
        """Selects the parameters that have gradients."""
        return [spec for name, spec in specs.items() if name in self.trained_names]

    @property
    def shared_specs(self) -> dict[str, ParamSpec]:
        """Parameters that several layers share."""
        prefix = f"{SHARED_BLOCKS}."
        return {
            name: spec for name, spec in self.specs.items() if name.startswith(prefix)
        }

    def count_reads(self, name: str) -> int:
        """Counts the times that one pass over the layers reads a parameter: once for
        each layer that shares it."""
        for module, num_layers in self.shared_readers.items():
            if name.startswith(f"{module}."):
                return num_layers
        return 1

    def is_kernel_recomputed(
        self, group: MatmulGroup, kernel: Kernel, remat: RematPolicy
    ) -> bool:
        """Whether the backward pass multiplies by a kernel again, for what it has not
        kept."""
        if remat == "none":
            return False
        if group.sum_kept_as is not None:
            return group.sum_kept_as not in SAVED[remat]
        output = kernel.output_features
        if output == "residual":
            return self.backward_needs_branch_output(group)
        if output == "mlp" and group.branch == "ffn":
            is_kept = "mlp_up" in SAVED[remat]
            return group.has_experts or not is_kept
        # Attention's latent vectors are never kept: what is made of them next needs
        # them.
        is_kept = kernel.is_named_qkv and "qkv" in SAVED[remat]
        return not is_kept or kernel.needs_raw_output

    def backward_needs_branch_output(self, group: MatmulGroup) -> bool:
        """Whether the backward pass needs what a residual branch, of which this is the
        last group, adds: for what stands behind it in the layer. Of experts that read
        narrow vectors it needs the sum, for the map that widens it; a gate on shared
        experts needs theirs."""
        experts = self.experts
        if experts is not None and group.branch == "ffn":
            if group.has_experts and experts.input_dim is not None:
                return True
            if group.module == "moe.shared" and experts.gates_shared:
                return True
        return group.backward_needs_output

    def is_in_stream_layout(self, group: MatmulGroup) -> bool:
        """Whether a group's tokens lie as those of the residual stream do: it maps
        between the stream and the narrow vectors of experts, or its module says so."""
        features = (group.input_features, group.output_features)
        maps_experts_vectors = group.branch == "ffn" and "latent" in features
        return group.is_in_stream_layout or maps_experts_vectors

    def is_attention_recomputed(self, remat: RematPolicy) -> bool:
        """Whether the backward pass makes attention's scores again from queries and
        keys, for what it has not kept."""
        return remat != "none" and "attention" not in SAVED[remat]


def _list_declared_names(tree: Params) -> frozenset[str]:
    """Returns the names of a tree's parameters; None stands for one that is left
    out."""
    specs = flatten_names(tree)
    return frozenset(name for name, spec in specs.items() if spec is not None)


class LocalAttentionWidths(NamedTuple):
    """Elements a token of attention's arrays on one device."""

    queries: Number
    output: Number
    keys: Number
    values: Number
    heads: Number
    """Query heads, and log-sum-exps."""
    gates: Number
    """Of the output."""


class MeshPartitioning:
    """Ways a mesh, or each of many, splits what axis rules name.

    Args:
        sizes: mesh axis → devices.
    """

    def __init__(self, config: RunConfig, sizes: Mapping[str, Number]):
        rules = config.sharding
        self.sizes = sizes
        self.storage = rules.storage
        self.compute = rules.compute
        self.gradients = rules.gradients or rules.storage
        self.optimizer = rules.optimizer or self.gradients
        self.sequence_parallel = tuple(
            axis for axis in rules.compute.residual if axis not in rules.compute.seq
        )
        """Mesh axes that split the residual stream's sequence, but not that within
        layers."""

    def num_devices(self, mesh_axes: Iterable[str]) -> Number:
        """Returns the number of devices along mesh axes together; an axis that is named
        twice counts once."""
        return prod((self.sizes[axis] for axis in dict.fromkeys(mesh_axes)), start=1.0)

    def num_shards(self, rules: AxisRules, axes: Iterable[str | None]) -> Number:
        """Counts the distinct pieces of an array."""
        return self.num_devices(
            axis for logical in axes for axis in rules.mesh_axes(logical)
        )

    def gather_axes(self, rules: AxisRules, kernel: Kernel) -> tuple[str, ...]:
        """Returns the mesh axes that split a kernel under rules and not in use."""
        stored: dict[str, None] = {}  # an ordered set
        used: set[str] = set()
        for logical in kernel.axes:
            stored |= dict.fromkeys(rules.mesh_axes(logical))
            used |= set(self.compute.mesh_axes(logical))
        return tuple(axis for axis in stored if axis not in used)

    def local_bytes(self, rules: AxisRules, specs: Iterable[ParamSpec]) -> Number:
        """Counts the bytes of arrays on a device, split by rules."""
        return sum(
            (spec.nbytes / self.num_shards(rules, spec.axes) for spec in specs),
            start=0.0,
        )

    def local_attention_widths(
        self, heads: AttentionCosts | None
    ) -> LocalAttentionWidths:
        """Returns the sizes of one branch's heads on a device; without any, zeros."""
        if heads is None:
            return LocalAttentionWidths(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        kv_axes = self.compute.mesh_axes(heads.kv_axis)
        query_heads = heads.num_heads / self.num_devices(self.compute.heads)
        kv_heads = heads.num_kv_heads / self.num_devices(kv_axes)
        return LocalAttentionWidths(
            queries=query_heads * heads.head_dim,
            output=query_heads * heads.value_dim,
            keys=kv_heads * heads.head_dim,
            values=kv_heads * heads.value_dim,
            heads=query_heads,
            gates=query_heads * heads.gate_dim,
        )

    def local_ffn_elements_per_token(self, group: MatmulGroup) -> Number:
        """Counts elements a token that matrices write into the FFN's width on a
        device."""
        if group.output_features != "mlp":
            return 0.0
        return sum(
            kernel.shape[-1] / self.num_shards(self.compute, kernel.axes[-1:])
            for kernel in group.kernels
        )

    def local_non_residual_width(
        self, group: MatmulGroup, *, named_qkv: bool | None = None
    ) -> Number:
        """Counts elements a token that matrices write within their layer on a device:
        those that remat policies keep by that name, the others, or (None) both."""
        width = 0
        for kernel in group.kernels:
            if kernel.output_features == "residual":
                continue
            if named_qkv not in (None, kernel.is_named_qkv):
                continue
            output_size = prod(kernel.shape[kernel.num_input_dims :])
            output_axes = kernel.axes[kernel.num_input_dims :]
            width += output_size / self.num_shards(self.compute, output_axes)
        return width


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
        self.work = work
        self.split = MeshPartitioning(work.config, sizes)
        self.micro_batches = micro_batches
        self.remat: RematPolicy = remat
        self._read_topology(topology)
        self._count_tokens()
        self._count_turns()
        self._count_outer_calls()

    def _read_topology(self, topology: Topology | None) -> None:
        """Tells the kernels, collectives and compiler's habits of a machine."""
        platform = topology and topology.platform
        self.ragged = topology is None or topology.kind not in ("v5e", "cpu")
        """Whether the devices exchange as many rows as there are; otherwise blocks for
        the worst case (``parallel/dispatch.py: DroplessDispatch``)."""
        self.fused_attention = platform in ("tpu", "gpu")
        """Whether a kernel keeps attention's scores on the chip
        (``pallas_kernels/attention``), but of attention with learnt biases."""
        self.fused_recurrence = platform == "tpu"
        """Whether a kernel keeps a recurrence's chunks on the chip
        (``pallas_kernels/linear_recurrence``); a GPU's has them in memory."""
        self.unordered_frozen_layers = platform == "gpu"
        """Whether the compiler has all branches of a layer with frozen kernels at once
        (XLA:GPU): it is gradients of kernels that put them in order
        (``parallel/linear.py``)."""

    def _count_tokens(self) -> None:
        work = self.work
        split = self.split
        batch_size = work.config.data.batch_size
        batch_ways = split.num_devices(split.compute.batch)
        self.micro_batch_size = batch_size / self.micro_batches / batch_ways
        """Sequences of a micro-batch on a device."""
        tokens = self.micro_batch_size * work.tokens_per_row.decoder
        self.micro_batch_tokens = tokens / split.num_devices(split.compute.seq)
        """Tokens of a micro-batch on a device within layers."""
        self.residual_tokens = tokens / split.num_devices(split.compute.residual)
        """Tokens of a micro-batch on a device in the residual stream."""

    def _count_turns(self) -> None:
        """Counts a pipeline's passes and turns; of a run without one, those of a single
        stage."""
        work = self.work
        parallel = work.config.parallel
        self.stages = self.split.num_devices(self.split.compute.layers)
        self.pipelined = np.greater(self.stages, 1)
        self.one_f_one_b = parallel.schedule == "1f1b"
        is_circular = parallel.schedule == "circular"
        self.layer_groups_per_stage = parallel.layer_groups if is_circular else 1
        # A pipeline's backward pass runs its stage forward once more.
        pipeline_recomputes = np.where(self.pipelined, 1, 0)
        self.layer_recomputes = pipeline_recomputes + (self.remat != "none")
        """Times that the backward pass runs layers as the forward pass did."""
        recomputes_scores = work.is_attention_recomputed(self.remat)
        self.score_recomputes = pipeline_recomputes + recomputes_scores
        """Times that the backward pass makes attention's scores as the forward pass
        did."""
        # The bubble of a circular schedule is shorter by the number of its groups
        # (Narayanan et al. 2021, arXiv 2104.04473, section 2.2.2).
        idle_passes = (self.stages - 1) / self.layer_groups_per_stage
        passes = np.where(
            self.pipelined, self.micro_batches + idle_passes, self.micro_batches
        )
        self.stage_passes_with_bubble = passes
        """Times that a stage passes all its layers, forward or backward, idle turns
        included: a device computes, and sends, in these too."""
        self.pipeline_iterations = passes * self.layer_groups_per_stage
        """Turns of a pipeline: of a stage, or of one of its groups of layers."""

    def _count_outer_calls(self) -> None:
        """Counts calls of the embedding and the loss, and the tokens that each sees."""
        # Whether micro-batches lie spread over a pipeline's stages before layers and
        # after, and embedding and loss see all of a device's at once (GPipe, circular).
        is_spread = self.pipelined & (not self.one_f_one_b)
        micro_batches_at_once = np.where(
            is_spread, self.micro_batches / self.stages, 1.0
        )
        self.embedding_loss_tokens = self.micro_batch_tokens * micro_batches_at_once
        """Tokens that embedding and loss see at once on a device."""
        products = self.embedding_loss_tokens * self.residual_tokens
        self.embedding_loss_residual_tokens = products / self.micro_batch_tokens
        """Part of these that the device holds in the residual stream."""
        self.loss_calls = np.where(is_spread, 1.0, self.micro_batches)
        """Times that the loss runs: once, or for each micro-batch (under 1F1B on every
        stage)."""
        self.embedding_calls = np.where(is_spread, 1.0, self.stage_passes_with_bubble)
        """Times that the embedding runs: once, or in each pass of a stage."""

    def gathered_weight_bytes(self, matrices: Kernel | MatmulGroup) -> Number:
        """Counts bytes of matrices as a device multiplies by them."""
        if isinstance(matrices, MatmulGroup):
            return sum(map(self.gathered_weight_bytes, matrices.kernels))
        split = self.split
        num_shards = split.num_shards(split.compute, matrices.axes)
        return matrices.size * self.work.dtype_bytes / num_shards

    def per_stage(self, layers: Number) -> Number:
        return layers / self.stages

    def count_frontend_rows(self) -> Number:
        """Counts the rows of a micro-batch that a device's frontend multiplies its
        matrices with: a row's items are whole on every device that has a part of its
        sequence."""
        frontend = self.work.frontend
        if frontend is None:
            return 0.0
        tokens = self.micro_batch_size * self.work.tokens_per_row.decoder
        return tokens * frontend.rows_per_token

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
        assert experts is not None
        if experts.capacity_factor is not None:
            return self.micro_batch_tokens * self.expert_rows_per_token
        per_token = experts.experts_per_token
        ways = self.split.num_devices(self.split.compute.expert)
        # At worst every device sends each of its tokens once to all the experts here.
        per_token_here = np.minimum(per_token, experts.num_experts / ways)
        is_split = np.greater(ways, 1)
        rows_per_token = np.where(is_split, ways * per_token_here, per_token)
        return self.micro_batch_tokens * rows_per_token
