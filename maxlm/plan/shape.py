"""A step's repetitions, and what one micro-batch is on one device."""

from dataclasses import dataclass

import numpy as np

from maxlm.models.remat import RematPolicy
from maxlm.plan.stacks import Kernel, MatmulGroup
from maxlm.plan.workload import MeshPartitioning, Number, RunWorkload


@dataclass(frozen=True)
class StepShape:
    """A run on a mesh, or on many."""

    work: RunWorkload
    split: MeshPartitioning
    micro_batches: Number
    """Micro-batches."""
    remat: RematPolicy
    ragged: bool = True
    """Whether the devices exchange as many rows as there are; otherwise blocks for the worst case
    (``parallel/dispatch.py: DroplessDispatch``)."""
    fused_attention: bool = False
    """Whether a kernel keeps attention's scores on the chip (``pallas_kernels/attention``), but of
    attention with learnt biases."""
    unordered_frozen_layers: bool = False
    """Whether the compiler has all branches of a layer with frozen kernels at once (XLA:GPU): it is
    gradients of kernels that put them in order (``parallel/linear.py``)."""

    def gathered_weight_bytes(self, matrices: Kernel | MatmulGroup) -> Number:
        """Bytes of matrices as a device multiplies by them."""
        itemsize, split = self.work.dtype_bytes, self.split
        if isinstance(matrices, MatmulGroup):
            return sum(map(self.gathered_weight_bytes, matrices.kernels))
        return matrices.size * itemsize / split.num_shards(split.compute, matrices.axes)

    @property
    def micro_batch_size(self) -> Number:
        """Sequences of a micro-batch on a device."""
        batch = self.work.config.data.batch_size
        return batch / self.micro_batches / self.split.num_devices(self.split.compute.batch)

    @property
    def micro_batch_tokens(self) -> Number:
        """Tokens of a micro-batch on a device within layers."""
        tokens = self.micro_batch_size * self.work.tokens_per_row.decoder
        return tokens / self.split.num_devices(self.split.compute.seq)

    @property
    def residual_tokens(self) -> Number:
        """Tokens of a micro-batch on a device in the residual stream."""
        tokens = self.micro_batch_size * self.work.tokens_per_row.decoder
        return tokens / self.split.num_devices(self.split.compute.residual)

    @property
    def stages(self) -> Number:
        return self.split.num_devices(self.split.compute.layers)

    def per_stage(self, layers: Number) -> Number:
        return layers / self.stages

    @property
    def layer_groups_per_stage(self) -> int:
        """Layer groups of a stage."""
        parallel = self.work.config.parallel
        return parallel.layer_groups if parallel.schedule == "circular" else 1

    @property
    def one_f_one_b(self) -> bool:
        return self.work.config.parallel.schedule == "1f1b"

    @property
    def pipelined(self) -> Number:
        return np.greater(self.stages, 1)

    @property
    def layer_recomputes(self) -> Number:
        """Times that the backward pass runs layers as the forward pass did."""
        return np.where(self.pipelined, 1, 0) + (self.remat != "none")

    @property
    def score_recomputes(self) -> Number:
        """Times that the backward pass makes attention's scores as the forward pass did."""
        return np.where(self.pipelined, 1, 0) + self.work.is_attention_recomputed(self.remat)

    @property
    def stage_passes_with_bubble(self) -> Number:
        """Times that a stage passes all its layers, forward or backward, idle turns included: a
        device computes, and sends, in these too."""
        idle = (self.stages - 1) / self.layer_groups_per_stage
        return np.where(self.pipelined, self.micro_batches + idle, self.micro_batches)

    @property
    def is_batch_split_over_stages(self) -> Number:
        """Whether micro-batches lie spread over a pipeline's stages before layers and after, and
        embedding and loss see all of a device's at once (GPipe, circular)."""
        return self.pipelined & (not self.one_f_one_b)

    @property
    def embedding_loss_tokens(self) -> Number:
        """Tokens that embedding and loss see at once on a device."""
        split = self.is_batch_split_over_stages
        return self.micro_batch_tokens * np.where(split, self.micro_batches / self.stages, 1.0)

    @property
    def embedding_loss_residual_tokens(self) -> Number:
        """Part of ``embedding_loss_tokens`` that the device holds in the residual stream."""
        return self.embedding_loss_tokens * self.residual_tokens / self.micro_batch_tokens

    @property
    def loss_calls(self) -> Number:
        """Times that the loss runs: once, or for each micro-batch (under 1F1B on every stage)."""
        return np.where(self.is_batch_split_over_stages, 1.0, self.micro_batches)

    @property
    def embedding_calls(self) -> Number:
        """Times that the embedding runs: once, or in each pass of a stage."""
        return np.where(self.is_batch_split_over_stages, 1.0, self.stage_passes_with_bubble)

    @property
    def pipeline_iterations(self) -> Number:
        """Turns of a pipeline: of a stage, or of one of its groups of layers."""
        return self.stage_passes_with_bubble * self.layer_groups_per_stage

    @property
    def expert_rows_per_token(self) -> float:
        """Rows of a token that experts multiply, empty places of a capacity included."""
        experts = self.work.experts
        assert experts is not None
        return experts.experts_per_token * (experts.capacity_factor or 1.0)

    @property
    def expert_buffer_rows(self) -> Number:
        """Rows of the buffers that experts receive: room for the worst case, or their capacity."""
        experts, ways = self.work.experts, self.split.num_devices(self.split.compute.expert)
        assert experts is not None
        if experts.capacity_factor is not None:
            return self.micro_batch_tokens * self.expert_rows_per_token
        own = experts.experts_per_token
        here = np.minimum(own, experts.num_experts / ways)
        return self.micro_batch_tokens * np.where(np.greater(ways, 1), ways * here, own)
