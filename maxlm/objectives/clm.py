"""Causal language modelling: predict the next token of the same document."""

from typing import Literal

import jax
from pydantic import Field

from maxlm.config import Config
from maxlm.models.architectures import Model
from maxlm.parallel.cross_entropy import fused_cross_entropy

Batch = dict[str, jax.Array]


class ClmConfig(Config):
    kind: Literal["clm"] = "clm"
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser; 1e-4 steadies long runs in bf16, 0 is plain
    cross-entropy."""
    chunk_tokens: int = Field(default=1024, gt=0)
    """Tokens a device holds logits of at once: chunk_tokens × vocab_size fp32 values."""


def clm(
    config: ClmConfig, model: Model, batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed next-token loss of a batch.

    Args:
        model: bound to its parameters.
        batch: int32 tokens, targets, positions, segment_ids and fp32 weights, all [B, S], or
            [M, B, S] on pipeline stages.
        key: unused; other objectives draw masks from it.

    Returns:
        The loss to differentiate, summed over counted tokens, and sums to log: ``tokens`` (the
        weight to divide by) and ``cross_entropy`` in nats.
    """
    hidden, aux = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    head, used, whole = model.unembedding()
    loss, cross_entropy = fused_cross_entropy(
        hidden,
        head,
        batch["targets"],
        batch["weights"],
        used=used,
        whole=whole,
        z_loss=config.z_loss,
        chunk=config.chunk_tokens,
    )
    sums = {"tokens": batch["weights"].sum(), "cross_entropy": cross_entropy}
    return loss + aux.loss, sums | aux.sums
