"""How many tokens a text has at least, told from its characters, without encoding it.

A text that is far too long for a model is refused by this number in the time of reading
it once; the libraries take some hundred bytes of memory for each of its bytes. The
number is never above the text's own: a token stands for no more than the longest token
does, as far as a tokenizer's normalizer and unknown tokens let that be said.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.huggingface import EncodingSteps, HuggingFaceCodec

TokenCountBound = Callable[[str], int]
"""Returns a number that ``len(tokenizer.encode(text))`` is never below, with special
tokens read as such or not."""

# Canonical decompositions have four code points at most (U+1F82), and none is empty:
# composing (NFC, NFKC) makes at most that many one.
_MAX_COMPOSED = 4
_CHUNK_BYTES = 1 << 20
_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
_SPACES += "".join(map(chr, range(0x2000, 0x200B)))


def make_token_count_bound(tokenizer: Tokenizer) -> TokenCountBound:
    """Returns the best bound that can be told of a tokenizer."""
    codec = tokenizer.codec
    if not isinstance(codec, HuggingFaceCodec):
        if codec.lossless:
            return _bound_by_bytes(codec.token_bytes, spaces_may_go=False)
        return _bound_by_words(codec.token_bytes)
    steps = codec.steps
    spaces_may_go = steps.added_tokens_strip
    if codec.lossless or steps.tokens_are_bytes:
        return _bound_by_bytes(codec.token_bytes, spaces_may_go)
    min_chars_share = _find_min_chars_share(steps)
    if min_chars_share is not None:
        most_bytes = max(len(token) for token in codec.token_bytes)
        longest_token = max(most_bytes, steps.longest_token)
        return _bound_by_chars(longest_token, min_chars_share, spaces_may_go)
    if steps.splits_at_spaces:
        return _bound_by_words(codec.token_bytes)
    return lambda text: 0


def _bound_by_bytes(
    token_bytes: Sequence[bytes], spaces_may_go: bool
) -> TokenCountBound:
    """Counts for a tokenizer whose tokens' bytes are the text's. Each byte is a part of
    one token, and is at least ``1 / L`` of it, ``L`` the length of the longest token
    that has such a byte. So the sum over all bytes of ``1 / L`` is at most the number
    of tokens. A byte without a token counts 0."""
    longest_with_byte = np.ones(256)
    for token in sorted(token_bytes, key=len):
        longest_with_byte[list(set(token))] = len(token)
    is_known = np.zeros(256)
    is_known[[token[0] for token in token_bytes if len(token) == 1]] = 1
    shares = is_known / longest_with_byte
    if spaces_may_go:
        # A special token may take spaces beside it, which Unicode has of several bytes
        # too.
        shares[128:] = 0
        shares[[ord(space) for space in _SPACES if space.isascii()]] = 0

    def count(text: str) -> int:
        total = 0.0
        for data in _iterate_chunks(text):
            total += float(np.bincount(data, minlength=256) @ shares)
        # Rounding may lift a sum that is a whole number.
        return int(np.ceil(total * (1 - 1e-9) - 1e-9))

    return count


def _bound_by_chars(
    longest_token: int, min_chars_share: float, spaces_may_go: bool
) -> TokenCountBound:
    """Counts for a tokenizer that changes characters and drops none: of each text at
    least ``min_chars_share * len(text)`` characters are left, and no token has more than
    ``longest_token``."""

    def count(text: str) -> int:
        num_chars = len(text)
        if spaces_may_go:
            num_chars -= sum(text.count(space) for space in _SPACES)
        return int(num_chars * min_chars_share / longest_token)

    return count


def _bound_by_words(token_bytes: Sequence[bytes]) -> TokenCountBound:
    """Counts for a tokenizer that splits at spaces, and may take a whole word for one
    unknown token: letters and digits of ASCII are what every normalizer leaves."""
    most_spaces = max(token.count(b" ") for token in token_bytes)
    is_word = np.zeros(256, np.bool_)
    is_word[[byte for byte in range(128) if chr(byte).isalnum()]] = True

    def count(text: str) -> int:
        num_words = 0
        for data in _iterate_chunks(text):
            begins_word = (data[:-1] == ord(" ")) & is_word[data[1:]]
            num_words += int(np.count_nonzero(begins_word))
        return num_words // (1 + most_spaces)

    return count


def _iterate_chunks(text: str) -> Iterator[np.ndarray]:
    """Yields a text's bytes, uint8, in parts."""
    for start in range(0, len(text), _CHUNK_BYTES):
        part = text[start : start + _CHUNK_BYTES]
        yield np.frombuffer(part.encode("utf-8", "surrogatepass"), np.uint8)


def _find_min_chars_share(steps: EncodingSteps) -> float | None:
    """Returns the share of a text's characters that is left after normalization at
    least; None: it cannot be told, or an unknown token stands for any number of
    characters."""
    if not steps.has_all_bytes or not steps.pre_tokenizers_keep_text:
        return None
    share = 1.0
    for step in steps.normalizers:
        match step:
            case {"type": "NFD" | "NFKD" | "Lowercase" | "Prepend"}:
                pass
            case {"type": "NFC" | "NFKC"}:
                share /= _MAX_COMPOSED
            case {
                "type": "Replace",
                "pattern": {"String": str(old)},
                "content": str(new),
            } if old:
                share *= min(1.0, len(new) / len(old))
            case _:
                return None
    return share or None
