"""Hot loops of the substring stage, over the UTF-8 of documents that lie end to end.

Imported only where it runs, as it loads Numba.
"""

import numpy as np
from numba import njit

from maxlm.corpus.characters import ALONE, EXTEND, SPACE
from maxlm.corpus.kernels.text import decode, mix

_PRIME = np.uint64(0x100000001B3)
_BASE = np.uint64(0x9FB21C651E98DF25)
_SEED = np.uint64(0xCBF29CE484222325)
_ZERO = np.uint64(0)
_BLOCK = 4096


@njit(cache=True, nogil=True)
def find_words(data, offsets, classes):
    """The words of each document: runs of visible characters, in which each letter of a script
    without spaces is a word of its own, with the marks that belong to it.

    Args:
        data: the documents, uint8, of fewer than 2^32 bytes.
        offsets: where each begins, and the end: int64 [documents + 1].
        classes: `characters.character_classes()`.

    Returns:
        Each word's first byte and the byte after its last: uint32 [words]. Each document's first
        word, and the number of words: int64 [documents + 1].
    """
    # No two words take fewer than two bytes and a space, or than a byte and a letter of three.
    most = len(data) // 2 + len(offsets)
    starts, stops = np.empty(most, np.uint32), np.empty(most, np.uint32)
    first = np.zeros(len(offsets), np.int64)
    count = 0
    for document in range(len(offsets) - 1):
        stop = offsets[document + 1]
        inside, alone = False, False
        i = offsets[document]
        while i < stop:
            code, after = decode(data, i, stop)
            bits = classes[code]
            if bits & SPACE:
                if inside:
                    stops[count] = i
                    count += 1
                inside = False
            elif not inside or (not bits & EXTEND and (alone or bits & ALONE)):
                if inside:
                    stops[count] = i
                    count += 1
                starts[count] = i
                inside, alone = True, bits & ALONE != 0
            i = after
        if inside:
            stops[count] = stop
            count += 1
        first[document + 1] = count
    return starts[:count].copy(), stops[:count].copy(), first


@njit(cache=True, nogil=True)
def hash_windows(data, starts, stops, first, size):
    """A hash of each run of `size` words within a document, white space between them included.

    Returns:
        uint64 [windows], and the word with which each begins, uint32 [windows].
    """
    count = len(starts)
    # Of each word: its bytes; its bytes and the white space up to the next.
    words, steps = np.empty(count, np.uint64), np.empty(count, np.uint64)
    for i in range(count):
        value = _SEED
        for k in range(starts[i], stops[i]):
            value = (value ^ np.uint64(data[k])) * _PRIME
        words[i] = mix(value)
        if i + 1 < count:  # Across the end of a document it is of no use, and no harm.
            for k in range(stops[i], starts[i + 1]):
                value = (value ^ np.uint64(data[k])) * _PRIME
        steps[i] = mix(value ^ _BASE)
    windows = 0
    for document in range(len(first) - 1):
        windows += max(0, first[document + 1] - first[document] - size + 1)
    hashes, begins = np.empty(windows, np.uint64), np.empty(windows, np.uint32)
    power = np.uint64(1)
    for _ in range(size - 2):
        power *= _BASE
    done = 0
    for document in range(len(first) - 1):
        begin, end = first[document], first[document + 1]
        if end - begin < size:
            continue
        value = _ZERO
        for i in range(begin, begin + size - 1):
            value = value * _BASE + steps[i]
        for i in range(begin, end - size + 1):
            last = i + size - 1
            hashes[done] = mix(value * _BASE + words[last])
            begins[done] = i
            done += 1
            value = (value - steps[i] * power) * _BASE + steps[last]
    return hashes, begins


@njit(cache=True, nogil=True)
def equal_windows(data, starts, stops, words, other, places, size):
    """Which windows are, byte for byte, what stands at `places` of `other`.

    Args:
        words: the word with which each begins, rising, int64 [windows].
        places: bytes of `other`, int64 [windows].

    Returns:
        bool [windows].
    """
    equal = np.zeros(len(words), np.bool_)
    for k in range(len(words)):
        word, place = words[k], places[k]
        begin, end = np.int64(starts[word]), np.int64(stops[word + size - 1])
        if place + end - begin > len(other):
            continue
        at = begin
        # Most go on where the one before does, of which only a word is new.
        if k > 0 and equal[k - 1] and words[k - 1] == word - 1:
            before = np.int64(starts[word - 1])
            if place - places[k - 1] == begin - before:
                at = np.int64(stops[word + size - 2])
        shift = place - begin
        while at < end and data[at] == other[at + shift]:
            at += 1
        equal[k] = at == end
    return equal


@njit(cache=True, nogil=True)
def find_first_copies(document, begin, end, last, of, at, may_keep):
    """Which parts of runs whose source is dropped are in another such run before.

    Args:
        document, begin, end, last, of, at: as `REPEATS` has them, int64 [runs]; sorted by `of`,
            those of one `of` from the best document to the worst, and by `begin`.
        may_keep: whether the document may keep a run for others, bool [runs].

    Returns:
        int64 [parts, 5]: the document, begin and end, and the other's document and begin.
    """
    parts, number = np.empty((16, 5), np.int64), 0
    # Kept runs by their place in the source: a list for each of its blocks, in order.
    low, high = at // _BLOCK, (at + end - begin) // _BLOCK
    size = high.max() + 1 if len(high) else 0
    heads, tails, owner = np.empty(size, np.int64), np.empty(size, np.int64), np.full(size, -1)
    runs, following = np.empty((2, (high - low + 1).sum()), np.int64)
    count = 0
    for i in range(len(document)):
        covered = False
        for block in range(low[i], high[i] + 1):
            node = heads[block] if owner[block] == of[i] else -1
            while node >= 0 and not covered:
                j, node = runs[node], following[node]
                if block != max(low[i], low[j]):
                    continue  # Seen in an earlier block.
                # In places of the source, where a window that both have begins at `start`.
                start = max(at[i], at[j])
                size = min(at[i] + end[i] - begin[i], at[j] + end[j] - begin[j]) - start
                here, there = begin[i] + start - at[i], begin[j] + start - at[j]
                apart = document[i] != document[j] or there + size <= here
                if here > last[i] or there > last[j] or not apart:
                    continue
                if number == len(parts):
                    parts = np.concatenate((parts, np.empty_like(parts)))
                parts[number] = document[i], here, here + size, document[j], there
                number += 1
                covered = size == end[i] - begin[i]
        if not may_keep[i] or covered:
            continue
        for block in range(low[i], high[i] + 1):
            runs[count], following[count] = i, -1
            if owner[block] == of[i]:
                following[tails[block]] = count
            else:
                owner[block], heads[block] = of[i], count
            tails[block] = count
            count += 1
    return parts[:number].copy()
