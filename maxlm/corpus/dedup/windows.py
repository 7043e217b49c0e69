"""Words and windows of words of texts that lie end to end, as arrays of code points.

A word is a run of visible characters, in which each letter of a script without spaces is a word of
its own, with the marks that belong to it. A window is a run of words of one document.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from maxlm.corpus.dedup.minhash import mix_bits
from maxlm.corpus.text import ALONE, EXTEND, SPACE, get_code_point_classes

# Odd, and so invertible modulo 2^64.
_BASE, CHECK_BASE = 0x9FB21C651E98DF25, 0xD6E8FEB86659FD93
_BLOCK = 4096


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


def match_earlier_copies(runs: np.ndarray, may_keep: np.ndarray) -> np.ndarray:
    """Finds which parts of runs whose source is dropped are in another such run before.

    Args:
        runs: document, begin, end, last, of, at as `REPEATS` has them, int64 [runs, 6]; sorted by
            `of`, those of one `of` from the best document to the worst, and by `begin`.
        may_keep: whether the document may keep a run for others, bool [runs].

    Returns:
        int64 [parts, 5]: the document, begin and end, and the other's document and begin.
    """
    parts: list[tuple[int, ...]] = []
    # Kept runs by their place in the source, for each of its blocks that they are in.
    kept: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
    for run, may in zip(runs.tolist(), may_keep.tolist(), strict=True):
        document, begin, end, last, of, at = run
        blocks = range(at // _BLOCK, (at + end - begin) // _BLOCK + 1)
        found = ((block, other) for block in blocks for other in kept.get((of, block), ()))
        # In the first of the blocks that both are in.
        others = [other for block, other in found if block == max(at, other[5]) // _BLOCK]
        for theirs, their_begin, their_end, their_last, _, their_at in others:
            # In places of the source, where a window that both have begins at `start`.
            start = max(at, their_at)
            size = min(at + end - begin, their_at + their_end - their_begin) - start
            here, there = begin + start - at, their_begin + start - their_at
            apart = document != theirs or there + size <= here
            if here <= last and there <= their_last and apart:
                parts.append((document, here, here + size, theirs, there))
                if size == end - begin:
                    break
        else:
            for block in blocks if may else ():
                kept[of, block].append(tuple(run))
    return np.array(parts, np.int64).reshape(-1, 5)
