"""What a model is trained for.

An objective is a function ``(config, model, batch, key) -> (loss, sums)``: the loss summed over
counted tokens, and sums to log: ``tokens``, the weight everything is divided by, and
``cross_entropy`` in nats. What it needs done to text on the host, before a batch is laid on
devices, is a picklable ``(batch, step, rows) -> batch`` (:func:`host_transform`). To add one, write
it beside its config and join them to the names below.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from maxlm.config import add_default_tag
from maxlm.tasks.clm import ClmConfig
from maxlm.tasks.denoising import (
    INPUTS,
    Denoising,
    DenoisingConfig,
    SpanCorruptionConfig,
    Ul2Config,
    rewrite,
)
from maxlm.tasks.loss import name_tokens
from maxlm.tasks.mlm import Masking, MlmConfig
from maxlm.tasks.vocabulary import Vocabulary

ObjectiveConfig = Annotated[
    ClmConfig | MlmConfig | SpanCorruptionConfig | Ul2Config,
    Field(discriminator="kind"),
    add_default_tag("kind", "clm"),
]
OBJECTIVES: Mapping[str, Any] = {
    "clm": name_tokens,
    "mlm": name_tokens,
    "span_corruption": rewrite,
    "ul2": rewrite,
}
ARCHITECTURES = {
    "clm": "decoder",
    "mlm": "encoder",
    "span_corruption": "encoder_decoder",
    "ul2": "encoder_decoder",
}
"""What each trains."""

Transform = Callable[[dict[str, np.ndarray], int, Sequence[int]], dict[str, np.ndarray]]
"""(batch of the loader, step, its rows' global numbers) -> batch."""


def host_transform(
    config: Any, vocabulary: Vocabulary, *, start_id: int, seed: int
) -> Transform | None:
    """What an objective does to batches on the host; None: nothing.

    Args:
        start_id: what a decoder beside an encoder reads first.
    """
    if isinstance(config, MlmConfig):
        return Masking(config, vocabulary, seed)
    if isinstance(config, DenoisingConfig):
        return Denoising(config, vocabulary, start_id, seed)
    return None


def batch_arrays(config: Any, seq_len: int) -> dict[str, tuple[int, type]]:
    """A batch's arrays by name: tokens a row, and dtype."""
    encoder_len, decoder_len = seq_len, seq_len
    if isinstance(config, DenoisingConfig):
        encoder_len, decoder_len = config.lengths(seq_len)
    names = ("tokens", "targets", "segment_ids", "positions")
    found: dict[str, tuple[int, type]] = dict.fromkeys(names, (decoder_len, np.int32))
    found["weights"] = (decoder_len, np.float32)
    if isinstance(config, DenoisingConfig):
        found |= dict.fromkeys(INPUTS, (encoder_len, np.int32))
    return found


def marks_needed(config: Any) -> int:
    """Ids of the model's table that the tokenizer must leave free."""
    if isinstance(config, MlmConfig):
        return int(config.mask_id is None)
    if isinstance(config, DenoisingConfig):
        return config.sentinels if config.first_sentinel is None else 0
    return 0


__all__ = [
    "ARCHITECTURES",
    "OBJECTIVES",
    "ClmConfig",
    "MlmConfig",
    "ObjectiveConfig",
    "SpanCorruptionConfig",
    "Transform",
    "Ul2Config",
    "Vocabulary",
    "batch_arrays",
    "host_transform",
    "marks_needed",
]
