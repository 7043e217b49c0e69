"""The loss of tokens that a model is to predict, whatever made them its targets."""

import jax

from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.architectures.transformer import Transformer
from maxlm.models.aux import Aux
from maxlm.parallel.cross_entropy import compute_fused_log_probs, fused_cross_entropy_loss
from maxlm.tasks.task import DeviceBatch, LossResult

ENCODER_ARRAYS = ("input_tokens", "input_positions", "input_segment_ids")
"""A batch's arrays for an encoder beside a decoder."""


def token_loss(
    model: Transformer,
    hidden: jax.Array,
    aux: Aux,
    batch: DeviceBatch,
    *,
    z_loss: float,
    chunk_tokens: int,
) -> LossResult:
    """The cross-entropy of a batch's ``targets``, weighted by ``weights``, summed over tokens.

    Args:
        hidden: [..., S, D], what the model made of the batch.
        aux: what its layers add.
        z_loss, chunk_tokens: see ``fused_cross_entropy_loss``.
    """
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


def token_prediction_loss(
    model: Transformer, batch: DeviceBatch, *, z_loss: float = 0.0, chunk_tokens: int = 1024
) -> LossResult:
    """The loss of a model of one sequence: next tokens, or masked ones.

    Args:
        batch: int32 tokens, targets, positions, segment_ids and fp32 weights, all [B, S], or
            [M, B, S] on pipeline stages.
    """
    hidden, aux = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    return token_loss(model, hidden, aux, batch, z_loss=z_loss, chunk_tokens=chunk_tokens)


def seq2seq_loss(
    model: EncoderDecoder, batch: DeviceBatch, *, z_loss: float = 0.0, chunk_tokens: int = 1024
) -> LossResult:
    """The loss of a decoder that writes an output for an encoder's input.

    Args:
        batch: as :func:`token_prediction_loss` has it, for the decoder [B, S_dec]; and int32
            input_tokens, input_positions and input_segment_ids [B, S_enc].
    """
    tokens, positions, segment_ids = (batch[name] for name in ENCODER_ARRAYS)
    inputs = (tokens, positions, segment_ids)
    hidden, aux = model(batch["tokens"], batch["positions"], batch["segment_ids"], inputs=inputs)
    return token_loss(model, hidden, aux, batch, z_loss=z_loss, chunk_tokens=chunk_tokens)
