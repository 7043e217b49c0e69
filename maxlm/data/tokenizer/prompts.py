"""Prompts as the ids that a model is given."""

from collections.abc import Sequence

from maxlm.data.tokenizer.codec import Tokenizer


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str | bytes],
    *,
    as_documents: bool,
    allow_special: bool = False,
) -> list[list[int]]:
    """Return the ids that a model is given for each prompt, at least one.
    ``as_documents``: prompts are documents, as an encoder reads them, rather than
    openings. ``allow_special``: special tokens in them are read as such."""
    end = [tokenizer.eos_id] if as_documents else []
    encoded = []
    for prompt in prompts:
        text_ids = tokenizer.encode(prompt, allow_special=allow_special)
        ids = [*tokenizer.prefix_ids, *text_ids, *end]
        # A model needs a token to start from, even where documents open without one.
        encoded.append(ids or [tokenizer.bos_id])
    return encoded
