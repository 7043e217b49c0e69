"""Hot loops of the heuristics stage: what a text repeats, after Gopher and FineWeb.

Imported only where it runs, as it loads Numba. Sets of lines and n-grams are kept by 64-bit hash,
so two that differ are taken for equal once in 10^12 documents or so.
"""

import numpy as np
from numba import njit

from maxlm.corpus.characters import SPACE, TERMINAL
from maxlm.corpus.kernels.text import decode, mix

_SHORT_LINE = 30  # FineWeb: characters.
_NEWLINE = 0x0A
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_POWER = np.uint64(0x9FB21C651E98DF25)


@njit(cache=True, nogil=True)
def ratio(part, whole):
    """Not a number for nothing of nothing."""
    return part / whole if whole else np.nan


@njit(cache=True, nogil=True)
def new_set(size):
    """A hash set for up to `size` keys: keys, stamps of the use, counts, first places."""
    slots = 16
    while slots < 2 * size:
        slots *= 2
    stamps = np.zeros(slots, np.int64)
    return np.empty(slots, np.uint64), stamps, np.empty(slots, np.int64), np.empty(slots, np.int64)


@njit(cache=True, nogil=True)
def find(table, stamp, key):
    """The slot that has the key, or the free one to put it; free ones bear an older stamp."""
    keys, stamps, _, _ = table
    last = np.uint64(len(keys) - 1)
    slot = mix(key) & last
    while stamps[slot] == stamp and keys[slot] != key:
        slot = (slot + np.uint64(1)) & last
    return slot


@njit(cache=True, nogil=True)
def repeated_lines(data, start, stop, classes, characters, table, stamp, gopher, fineweb):
    """Measures of lines and paragraphs, and of those that were there before.

    Args:
        gopher: filled with the shares of lines and of their characters that were there before,
            and the same for paragraphs.
        fineweb: filled with the shares of lines that end with a mark that ends sentences, that are
            short, and of characters in lines that were there before.
    """
    pieces, repeated, chars, lines, punctuated, short, line_chars, newlines = _pieces(
        data, start, stop, classes, 1, table, stamp
    )
    gopher[0] = ratio(repeated, pieces)
    gopher[1] = ratio(chars, characters)
    fineweb[0] = ratio(punctuated, lines)
    fineweb[1] = ratio(short, lines)
    fineweb[2] = ratio(line_chars, characters - newlines)
    a, b = _stripped(data, start, stop, classes)
    pieces, repeated, chars, _, _, _, _, _ = _pieces(data, a, b, classes, 2, table, stamp + 1)
    gopher[2] = ratio(repeated, pieces)
    gopher[3] = ratio(chars, characters)


@njit(cache=True, nogil=True)
def _stripped(data, start, stop, classes):
    """The bytes of a text without the white space around it."""
    i, a, b = start, stop, stop
    while i < stop:
        here = i
        code, i = decode(data, i, stop)
        if classes[code] & SPACE == 0:
            a = min(a, here)
            b = i
    return a, b


@njit(cache=True, nogil=True)
def _pieces(data, start, stop, classes, gap, table, stamp):
    """Counts of the pieces of a text between runs of at least `gap` newlines.

    Returns:
        pieces; those that were there before, and their characters; then of the pieces that are not
        blank: how many, those that end with a mark that ends sentences, short ones, the characters
        of those that were there before; newlines in the runs.
    """
    pieces, repeated, chars, lines, punctuated, short, line_chars, newlines = 0, 0, 0, 0, 0, 0, 0, 0
    keys, stamps, _, _ = table
    i, more = start, True
    while more:
        key, size, blank, bits = _PRIME, 0, True, np.uint8(0)
        run = 0
        while i < stop:
            run = 0
            while i + run < stop and data[i + run] == _NEWLINE:
                run += 1
            if run >= gap:
                break
            code, i = decode(data, i, stop)
            bits = classes[code]
            blank = blank and bits & SPACE != 0
            key = (key ^ np.uint64(code)) * _PRIME
            size += 1
        more = i < stop
        i += run if more else 0
        newlines += run if more else 0
        slot = find(table, stamp, key)
        known = stamps[slot] == stamp
        keys[slot], stamps[slot] = key, stamp
        pieces += 1
        repeated += known
        chars += size * known
        if not blank:
            lines += 1
            punctuated += bits & TERMINAL != 0
            short += size <= _SHORT_LINE
            line_chars += size * known
    return pieces, repeated, chars, lines, punctuated, short, line_chars, newlines


@njit(cache=True, nogil=True)
def repeated_ngrams(hashes, lengths, grams, count, characters, table, stamp, out):
    """Gopher's measures of n-grams of words and symbols.

    Args:
        hashes, lengths: of the words and symbols.
        grams: scratch of the same length.
        count: how many there are.
        out: filled for n from 2 to 10.
    """
    if characters == 0:
        for n in range(len(out)):
            out[n] = np.nan
        return
    for i in range(count):
        grams[i] = hashes[i]
    for n in range(2, 11):
        num_grams = count - n + 1
        for i in range(num_grams):
            grams[i] = grams[i] * _POWER + hashes[i + n - 1]
        if n < 5:
            chars = _top_ngram(grams, lengths, num_grams, n, table, stamp + n)
        else:
            chars = _repeated_chars(grams, lengths, num_grams, n, table, stamp + n)
        out[n - 2] = chars / characters
        if chars == 0:
            break  # No longer one is there twice either.


@njit(cache=True, nogil=True)
def _sum(lengths, first, number):
    # A loop, here and elsewhere: array expressions take seconds to compile.
    total = 0
    for i in range(first, first + number):
        total += lengths[i]
    return total


@njit(cache=True, nogil=True)
def _top_ngram(grams, lengths, num_grams, n, table, stamp):
    """Characters in the occurrences of the n-gram that occurs most, the first of several."""
    keys, stamps, counts, firsts = table
    most, best = 0, 0
    for i in range(num_grams):
        slot = find(table, stamp, grams[i])
        if stamps[slot] != stamp:
            keys[slot], stamps[slot], counts[slot], firsts[slot] = grams[i], stamp, 0, i
        counts[slot] += 1
        if counts[slot] > most or (counts[slot] == most and firsts[slot] < best):
            most, best = counts[slot], firsts[slot]
    return most * (_sum(lengths, best, n) + n - 1) if most else 0


@njit(cache=True, nogil=True)
def _repeated_chars(grams, lengths, num_grams, n, table, stamp):
    """Characters in n-grams that were there before, none counted twice."""
    keys, stamps, _, _ = table
    chars, i = 0, 0
    while i < num_grams:
        slot = find(table, stamp, grams[i])
        if stamps[slot] == stamp:
            chars += _sum(lengths, i, n)
            i += n
        else:
            keys[slot], stamps[slot] = grams[i], stamp
            i += 1
    return chars
