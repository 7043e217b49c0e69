"""The loss of tokens that a model is to predict, whatever made them its targets."""

from typing import Any

import jax

from maxlm.models.architectures.transformer import Transformer
from maxlm.parallel.cross_entropy import compute_fused_log_probs, fused_cross_entropy_loss
from maxlm.tasks.task import DeviceBatch, LossResult

ENCODER_ARRAYS = ("input_tokens", "input_positions", "input_segment_ids")
"""A batch's arrays for an encoder beside a decoder."""


def token_prediction_loss(
    model: Transformer, batch: DeviceBatch, *, z_loss: float = 0.0, chunk_tokens: int = 1024
) -> LossResult:
    """The cross-entropy of a batch's targets: next tokens, masked ones, or what a decoder writes
    for an encoder's input. Summed over tokens; what layers add (balance of experts) is in it.

    Args:
        batch: int32 tokens, targets, positions, segment_ids and fp32 weights, all [B, S], or
            [M, B, S] on pipeline stages; of an encoder-decoder also ``ENCODER_ARRAYS``.
        z_loss, chunk_tokens: see ``fused_cross_entropy_loss``.
    """
    inputs = tuple(batch[name] for name in ENCODER_ARRAYS if name in batch)
    beside: dict[str, Any] = {"inputs": inputs} if inputs else {}
    hidden, aux = model(batch["tokens"], batch["positions"], batch["segment_ids"], **beside)
    head = model.head_of(hidden)
    loss, cross_entropy = fused_cross_entropy_loss(
        head.hidden,
        head.kernel.value,
        batch["targets"],
        batch["weights"],
        used=head.kernel.used,
        whole=head.kernel.whole,
        bias=head.bias,
        soft_cap=head.cap,
        z_loss=z_loss,
        chunk=chunk_tokens,
    )
    sums = {"tokens": batch["weights"].sum(), "cross_entropy": cross_entropy}
    return loss + aux.loss, sums | aux.sums


def compute_log_probs(
    model: Transformer, hidden: jax.Array, targets: jax.Array, *, chunk_tokens: int = 1024
) -> jax.Array:
    """The log-probability of every token's target, fp32 [..., S]; differentiable.

    Args:
        hidden: [..., S, D], what the model made of a batch.
        targets: int [..., S].
    """
    head = model.head_of(hidden)
    return compute_fused_log_probs(
        head.hidden,
        head.kernel.value,
        targets,
        used=head.kernel.used,
        whole=head.kernel.whole,
        bias=head.bias,
        soft_cap=head.cap,
        chunk=chunk_tokens,
    )
