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
    micro: Number
    """Micro-batches."""
    remat: RematPolicy
    ragged: bool = True
    """Whether the devices exchange as many rows as there are; otherwise blocks for the worst case
    (``parallel/dispatch.py: DroplessDispatch``)."""
    fused_attention: bool = False
    """Whether a kernel keeps attention's scores on the chip (``pallas_kernels/attention``), but of
    attention with learnt biases."""

    def used_bytes(self, matrices: Kernel | MatmulGroup) -> Number:
        """Bytes of matrices as a device multiplies by them."""
        itemsize, split = self.work.dtype_bytes, self.split
        if isinstance(matrices, MatmulGroup):
            return sum(map(self.used_bytes, matrices.kernels))
        return matrices.size * itemsize / split.shards(split.compute, matrices.axes)

    @property
    def rows(self) -> Number:
        """Sequences of a micro-batch on a device."""
        batch = self.work.config.data.batch_size
        return batch / self.micro / self.split.ways(self.split.compute.batch)

    @property
    def tokens(self) -> Number:
        """Tokens of a micro-batch on a device within layers."""
        return self.rows * self.work.rows.own / self.split.ways(self.split.compute.seq)

    @property
    def residual_tokens(self) -> Number:
        """Tokens of a micro-batch on a device in the residual stream."""
        return self.rows * self.work.rows.own / self.split.ways(self.split.compute.residual)

    @property
    def stages(self) -> Number:
        return self.split.ways(self.split.compute.layers)

    def per_stage(self, layers: Number) -> Number:
        return layers / self.stages

    @property
    def groups(self) -> int:
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
    def reruns(self) -> Number:
        """Times that the backward pass runs layers as the forward pass did."""
        return np.where(self.pipelined, 1, 0) + (self.remat != "none")

    @property
    def score_reruns(self) -> Number:
        """Times that the backward pass makes attention's scores as the forward pass did."""
        return np.where(self.pipelined, 1, 0) + self.work.attention_recomputed(self.remat)

    @property
    def slots(self) -> Number:
        """Times that a stage passes all its layers, forward or backward, idle turns included: a
        device computes, and sends, in these too."""
        idle = (self.stages - 1) / self.groups
        return np.where(self.pipelined, self.micro + idle, self.micro)

    @property
    def spread(self) -> Number:
        """Whether micro-batches lie spread over a pipeline's stages before layers and after, and
        embedding and loss see all of a device's at once (GPipe, circular)."""
        return self.pipelined & (not self.one_f_one_b)

    @property
    def end_tokens(self) -> Number:
        """Tokens that embedding and loss see at once on a device."""
        return self.tokens * np.where(self.spread, self.micro / self.stages, 1.0)

    @property
    def end_residual_tokens(self) -> Number:
        """Part of ``end_tokens`` that the device holds in the residual stream."""
        return self.end_tokens * self.residual_tokens / self.tokens

    @property
    def losses(self) -> Number:
        """Times that the loss runs: once, or for each micro-batch (under 1F1B on every stage)."""
        return np.where(self.spread, 1.0, self.micro)

    @property
    def lookups(self) -> Number:
        """Times that the embedding runs: once, or in each of ``slots``."""
        return np.where(self.spread, 1.0, self.slots)

    @property
    def ticks(self) -> Number:
        """Turns of a pipeline: of a stage, or of one of its groups of layers."""
        return self.slots * self.groups

    @property
    def expert_rows(self) -> float:
        """Rows of a token that experts multiply, empty places of a capacity included."""
        experts = self.work.experts
        assert experts is not None
        return experts.experts_per_token * (experts.capacity_factor or 1.0)

    @property
    def received_rows(self) -> Number:
        """Rows of the buffers that experts receive: room for the worst case, or their capacity."""
        experts, ways = self.work.experts, self.split.ways(self.split.compute.expert)
        assert experts is not None
        if experts.capacity_factor is not None:
            return self.tokens * self.expert_rows
        own = experts.experts_per_token
        here = np.minimum(own, experts.num_experts / ways)
        return self.tokens * np.where(np.greater(ways, 1), ways * here, own)
