"""Hot loop that finds words and phrases of a list. Loads Numba; imported only where it runs."""

import numpy as np
from numba import njit

from maxlm.corpus.characters import WORD
from maxlm.corpus.kernels.text import first_bytes, tokenize

_POWER = np.uint64(0x9FB21C651E98DF25)


@njit(cache=True, nogil=True)
def phrase_hash(hashes):
    """One hash for the words and symbols of a phrase."""
    value = np.uint64(0)
    for each in hashes:
        value = value * _POWER + each
    return value


@njit(cache=True, nogil=True)
def count_listed(offsets, data, classes, lower, starts, phrases, longest_phrase, longest):
    """Count the phrases of a list in each text, from the start, the longest at each place.

    Args:
        offsets, data: the texts' UTF-8, int64 [texts + 1] and uint8.
        classes, lower: tables of `characters`.
        starts: hashes of the phrases' first words or symbols: uint64, sorted.
        phrases: `phrase_hash` of each phrase: uint64, sorted.
        longest_phrase: words and symbols in the longest.
        longest: bytes of a text that are looked at.

    Returns:
        Phrases found and words in each text: int64 [texts], [texts].
    """
    num_texts = len(offsets) - 1
    size = 1
    for row in range(num_texts):
        size = max(size, min(offsets[row + 1] - offsets[row], longest))
    hashes, lengths = np.empty(size, np.uint64), np.empty(size, np.int64)
    kinds = np.empty(size, np.uint8)
    maybe = np.zeros(1 << 16, np.bool_)  # By the last bits, as most words begin no phrase.
    for start in starts:
        maybe[start & np.uint64(0xFFFF)] = True
    found, words = np.zeros(num_texts, np.int64), np.zeros(num_texts, np.int64)
    for row in range(num_texts):
        stop = first_bytes(data, offsets[row], offsets[row + 1], longest)
        count, _ = tokenize(
            data, offsets[row], stop, classes, lower, hashes, lengths, kinds
        )  # fmt: skip
        words[row] = np.sum(kinds[:count] & WORD != 0)
        i = 0
        while i < count:
            step = 1
            if maybe[hashes[i] & np.uint64(0xFFFF)] and _has(starts, hashes[i]):
                for n in range(min(longest_phrase, count - i), 0, -1):
                    if _has(phrases, phrase_hash(hashes[i : i + n])):
                        found[row] += 1
                        step = n
                        break
            i += step
    return found, words


@njit(cache=True, nogil=True)
def _has(values, value):
    k = np.searchsorted(values, value)
    return k < len(values) and values[k] == value
