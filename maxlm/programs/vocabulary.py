"""A tokenizer's ids, for tasks and for generation."""

from collections.abc import Sequence

import numpy as np

from maxlm.data.tokenizer import Tokenizer
from maxlm.tasks import Vocabulary


def make_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """A tokenizer's ids, as tasks need to know them.

    A word begins where a token's text does not go on with a letter or digit: at a space, a sign,
    or what a WordPiece vocabulary does not mark as a continuation.

    Args:
        size: rows of the model's table; those past the tokenizer's ids count as special, and so do
            ids within that have no text.
    """
    special = np.ones(size, bool)
    special[: tokenizer.vocab_size] = False
    special[list(tokenizer.special_tokens.values())] = True
    starts_word = np.ones(size, bool)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode_bytes([token], continued=True)
        special[token] |= not text
        # Bytes of a character in the middle are neither, and go on with what came before.
        first = text.decode("utf-8", "replace")[:1]
        starts_word[token] = not (first.isalnum() or first == "\ufffd")
    return Vocabulary(
        size, tokenizer.vocab_size, tuple(tokenizer.opening), tokenizer.eos_id, special, starts_word
    )


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str | bytes], *, whole: bool
) -> list[list[int]]:
    """Return the ids that a model is given for each prompt, at least one.

    Args:
        whole: prompts are whole documents, as an encoder reads them, rather than openings.
    """
    end = [tokenizer.eos_id] if whole else []
    encoded = [[*tokenizer.opening, *tokenizer.encode(prompt), *end] for prompt in prompts]
    # A model needs a token to start from, even where documents open without one.
    return [ids or [tokenizer.bos_id] for ids in encoded]
