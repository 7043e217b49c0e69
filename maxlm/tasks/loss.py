"""The loss of tokens that a model is to name, whatever made them its targets."""

from collections.abc import Mapping

import jax
from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.models.architectures.transformer import Transformer
from maxlm.models.aux import Aux
from maxlm.parallel.cross_entropy import fused_cross_entropy_loss

Batch = dict[str, jax.Array]
Result = tuple[jax.Array, dict[str, jax.Array]]
"""The loss to differentiate, summed over counted tokens, and sums to log: ``tokens`` (the weight to
divide by) and ``cross_entropy`` in nats."""


class LossConfig(Config):
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser; 1e-4 steadies long runs in bf16, 0 is plain
    cross-entropy."""
    chunk_tokens: int = Field(default=1024, gt=0)
    """Tokens a device holds logits of at once: chunk_tokens × vocab_size fp32 values."""

    @property
    def marks(self) -> Mapping[str, int | None]:
        """Settings that are ids; None: one is found."""
        return {}

    def check(self, seq_len: int, vocab_size: int) -> None:
        """Check that this can be done to rows of text, for a table of so many rows.

        Raises:
            MaxlmError: naming the setting.
        """
        for name, mark in self.marks.items():
            if mark is not None and mark >= vocab_size:
                raise MaxlmError(
                    f"{mark} is no row of the model's table, model.vocab_size={vocab_size}",
                    where=f"objective.{name}",
                    fix="name one of the tokenizer's ids, or null",
                )


def token_loss(
    config: LossConfig, model: Transformer, hidden: jax.Array, aux: Aux, batch: Batch
) -> Result:
    """Summed loss of a batch's targets.

    Args:
        hidden: [..., S, D], what the model made of the batch.
        aux: what its layers add.
        batch: ``targets`` and ``weights`` [..., S] are used.
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
        z_loss=config.z_loss,
        chunk=config.chunk_tokens,
    )
    sums = {"tokens": batch["weights"].sum(), "cross_entropy": cross_entropy}
    return loss + aux.loss, sums | aux.sums


def name_tokens(config: LossConfig, model: Transformer, batch: Batch, key: jax.Array) -> Result:
    """The loss of a model of one sequence: what comes next, or what is masked.

    Args:
        model: bound to its parameters.
        batch: int32 tokens, targets, positions, segment_ids and fp32 weights, all [B, S], or
            [M, B, S] on pipeline stages.
        key: unused; other objectives draw from it.
    """
    hidden, aux = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    return token_loss(config, model, hidden, aux, batch)
