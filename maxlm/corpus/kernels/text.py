"""Hot loops over UTF-8 text: decoding, and the words and symbols of `characters`.

Imported only where it runs, as it loads Numba. Bytes that are no valid UTF-8 do no harm: each bad
byte counts as one character. Numba's cache does not see that a function in another file changed:
after an edit here, delete `__pycache__`.
"""

import numpy as np
from numba import njit

from maxlm.corpus.characters import ALONE, DIGIT, EXTEND, LETTER, SPACE, WORD

_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_SEED = np.uint64(0xCBF29CE484222325)
_HALF = np.uint64(32)
_APOSTROPHES = (0x27, 0x2019)
_JOINERS = (0x2E, 0x5F, 0xB7)  # . _ ·


@njit(cache=True, nogil=True)
def mix(value):
    """MurmurHash3's finaliser of 64 bits, with shifts by 32: a bijection that spreads every bit."""
    value = (value ^ (value >> _HALF)) * _MIX_1
    value = (value ^ (value >> _HALF)) * _MIX_2
    return value ^ (value >> _HALF)


@njit(cache=True, nogil=True)
def decode(data, i, stop):
    """The character at byte i, and where the next one begins."""
    first = np.int64(data[i])
    if first < 0x80:
        return first, i + 1
    if first >= 0xF0 and first < 0xF5:
        size, code = 4, first & 7
    elif first >= 0xE0:
        size, code = 3, first & 15
    else:
        size, code = 2, first & 31
    if first < 0xC2 or first >= 0xF5 or i + size > stop:
        return np.int64(0xFFFD), i + 1
    for k in range(i + 1, i + size):
        byte = np.int64(data[k])
        if byte & 0xC0 != 0x80:
            return np.int64(0xFFFD), i + 1
        code = code << 6 | byte & 63
    return (code, i + size) if code < 0x110000 else (np.int64(0xFFFD), i + 1)


@njit(cache=True, nogil=True)
def tokenize(data, start, stop, classes, lower, hashes, lengths, kinds):
    """Words and symbols of a text, in order.

    Args:
        data: UTF-8, uint8.
        start, stop: the text's bytes in data.
        classes: `characters.character_classes()`.
        lower: `characters.lower_case()` or `AS_IS`.
        hashes, lengths, kinds: filled for each: a 64-bit hash, its characters, its bits WORD (none
            for a symbol) and LETTER (it has one). Of stop - start items at least.

    Returns:
        How many there are; characters in the text.
    """
    count, characters = 0, 0
    inside = False
    kind, length, last = 0, 0, np.int64(0)
    value = _SEED
    i = start
    while i < stop:
        code, i = decode(data, i, stop)
        characters += 1
        bits = classes[code]
        if bits & SPACE:
            goes_on, starts = False, False
        elif bits & EXTEND:
            goes_on, starts = inside, False
        elif bits & WORD:
            goes_on = inside and kind & WORD != 0 and (bits | kind) & ALONE == 0
            starts = not goes_on
        elif inside and kind & WORD == 0:
            goes_on, starts = code == last, code != last
        else:
            joins = inside and kind & ALONE == 0 and _joins(data, code, last, i, stop, classes)
            goes_on = joins and code not in _APOSTROPHES
            starts = not goes_on
            bits |= WORD * joins  # The apostrophe begins a word.
        if inside and not goes_on:
            hashes[count], lengths[count], kinds[count] = mix(value), length, kind
            count += 1
            inside = False
        if starts:
            inside, value, length, kind = True, _SEED, 0, bits & (WORD | ALONE)
        if starts or goes_on:
            folded = np.int64(lower[code]) if code < len(lower) else code
            value = (value ^ np.uint64(folded)) * _PRIME
            length += 1
            if kind & WORD:
                kind |= bits & LETTER
            if not bits & EXTEND:
                last = code
    if inside:
        hashes[count], lengths[count], kinds[count] = mix(value), length, kind
        count += 1
    return count, characters


@njit(cache=True, nogil=True)
def _joins(data, code, last, i, stop, classes):
    """Whether a mark between `last` and the character at i joins two words."""
    if i >= stop or (code != 0x2C and code not in _JOINERS and code not in _APOSTROPHES):
        return False
    after = classes[decode(data, i, stop)[0]]
    if code == 0x2C:
        return after & DIGIT != 0 and classes[last] & DIGIT != 0
    return after & WORD != 0 and after & ALONE == 0 and classes[last] & WORD != 0


@njit(cache=True, nogil=True)
def token_hashes(data, classes, lower):
    """The hashes of a text's words and symbols, uint64."""
    size = len(data)
    hashes, lengths = np.empty(size, np.uint64), np.empty(size, np.int64)
    kinds = np.empty(size, np.uint8)
    count, _ = tokenize(data, 0, size, classes, lower, hashes, lengths, kinds)
    return hashes[:count].copy()


@njit(cache=True, nogil=True)
def first_bytes(data, start, stop, longest):
    """Where a text ends of which at most `longest` bytes are looked at: between characters."""
    if stop - start <= longest:
        return stop
    stop = start + longest
    while stop > start and data[stop] & 0xC0 == 0x80:
        stop -= 1
    return stop


@njit(cache=True, nogil=True)
def count_characters(data, begins, positions):
    """Characters between each of `begins` and the byte `positions`, of whole characters.

    Both rise, so that counting goes on where a position shares the last one's begin.
    """
    counts = np.empty(len(positions), np.int32)
    for k in range(len(positions)):
        at, count = begins[k], 0
        if k > 0 and begins[k - 1] == at:
            at, count = positions[k - 1], counts[k - 1]
        while at < positions[k]:
            count += data[at] & 0xC0 != 0x80
            at += 1
        counts[k] = count
    return counts
