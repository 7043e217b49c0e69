"""Words and windows of words of texts that lie end to end, as arrays of code points.

A word is a run of visible characters, in which each letter of a script without spaces is a word of
its own, with the marks that belong to it. A window is a run of words of one document.
"""

from collections.abc import Sequence

import numpy as np

from maxlm.corpus.dedup.minhash import mix_bits
from maxlm.corpus.text import ALONE, EXTEND, SPACE, get_code_point_classes

# Odd, and so invertible modulo 2^64.
_BASE, CHECK_BASE = 0x9FB21C651E98DF25, 0xD6E8FEB86659FD93


def concatenate_texts(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Joins texts: the code points, uint32, and where each begins, int64 [texts + 1]."""
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return np.concatenate([np.empty(0, np.uint32), *texts]), ends


def get_code_points(text: str) -> np.ndarray:
    """Returns the code points of a text: uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def find_words(text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the words of each document.

    Returns:
        Each word's first character and the one after its last: int64 [words]. Each document's first
        word, and the number of words: int64 [documents + 1].
    """
    bits = get_code_point_classes()[text]
    opens = np.zeros(len(text) + 1, np.bool_)  # A document begins.
    opens[offsets] = True
    opens = opens[:-1]
    space, alone = bits & SPACE > 0, bits & ALONE > 0
    begins = (bits & EXTEND == 0) | opens
    # The last character of the document before this one that is no mark, if there is one.
    anchor = np.maximum.accumulate(np.where(begins, np.arange(len(text)), 0))
    after = np.roll(alone[anchor], 1)
    starts = ~space & (opens | np.roll(space, 1) | (begins & (after | alone)))
    edges = np.append(np.flatnonzero(starts | space | opens), len(text))
    starts = np.flatnonzero(starts)
    stops = edges[np.searchsorted(edges, starts, "right")]
    return starts, stops, np.searchsorted(starts, offsets)


def hash_windows(
    text: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    document_word_offsets: np.ndarray,
    window_words: int,
    base: int = _BASE,
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes each run of `window_words` words within a document, with the white space between them,
    from what `find_words` found.

    The hash is a polynomial of the characters: the difference of two sums up to its ends, times a
    power that makes up for where it begins.

    Returns:
        uint64 [windows], and the word with which each begins, int64 [windows].
    """
    ends = np.repeat(document_word_offsets[1:], np.diff(document_word_offsets))
    begins = np.flatnonzero(np.arange(len(starts)) + window_words <= ends)
    powers = _list_powers(base, len(text))
    sums = np.zeros(len(text) + 1, np.uint64)
    np.cumsum((text.astype(np.uint64) + np.uint64(1)) * powers, out=sums[1:])
    inverse = _list_powers(pow(base, -1, 2**64), len(text))
    start, stop = starts[begins], stops[begins + window_words - 1]
    return mix_bits((sums[stop] - sums[start]) * inverse[start]), begins


def _list_powers(base: int, number: int) -> np.ndarray:
    powers = np.full(number, base, np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers)
