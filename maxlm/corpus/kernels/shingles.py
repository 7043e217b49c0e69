"""Hot loops of near-duplicate search and decontamination: words and their n-grams.

Imported only where it runs, as it loads Numba.
"""

import numpy as np
from numba import njit

from maxlm.corpus.dedup.words import (
    BY_ITSELF,
    FOLLOWS,
    IGNORED,
    PLACE,
    SEPARATOR,
    SEVERAL,
)
from maxlm.corpus.kernels.text import decode, mix

_SEED = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_HIGH = np.uint64(32)
_CHUNK = 1 << 14  # Words of a document that are looked at together.


@njit(cache=True, nogil=True)
def hash_words(data, start, stop, table, hashes, count, begins, ends):
    """Hash the words of a text until `hashes` is full.

    Args:
        data: UTF-8, uint8.
        start, stop: the bytes to look at; start does not lie within a word.
        table: `words.letter_table()`.
        hashes: uint64; filled from `count` on.
        begins, ends: int64 like hashes, filled with each word's bytes in `data`; or empty: not.

    Returns:
        How many of `hashes` are filled; where to go on, `stop` at the end.
    """
    place = len(begins) > 0
    inside, alone, value, i = False, False, _SEED, start
    while i < stop:
        here = i
        code, i = decode(data, i, stop)
        letter = table[code]
        if letter == IGNORED:
            continue
        follows = letter & np.uint32(FOLLOWS) != 0
        single = letter & np.uint32(BY_ITSELF) != 0
        begins_word = letter != SEPARATOR and not follows and (single or alone or not inside)
        if inside and (letter == SEPARATOR or begins_word):
            hashes[count] = mix(value)
            if place:
                ends[count] = here
            count += 1
            inside, alone = False, False
            if count == len(hashes):
                return count, here
        if begins_word:
            inside, alone, value = True, single, _SEED
            if place:
                begins[count] = here
        if inside and letter & np.uint32(SEVERAL):
            part = letter & np.uint32(PLACE)
            while table[part] != SEPARATOR:
                value = (value ^ np.uint64(table[part])) * _PRIME
                part += np.uint32(1)
        elif inside:
            value = (value ^ np.uint64(letter)) * _PRIME
    if inside:
        hashes[count] = mix(value)
        if place:
            ends[count] = stop
        count += 1
    return count, stop


@njit(cache=True, nogil=True, inline="always")
def _shingle(words, first, size):
    # From the last word to the first: then shorter n-grams that end at the same word come by.
    value = _SEED
    for i in range(first + size - 1, first - 1, -1):
        value = (value ^ words[i]) * _PRIME
    return mix(value)


@njit(cache=True, nogil=True)
def shingles(data, start, stop, table, size):
    """The 64-bit hashes of a text's shingles, one for each place: uint64 [shingles]; its words.

    A text of fewer words than `size` has one shingle, of all its words; one without words none.
    """
    words = np.empty((stop - start) // 2 + 2, np.uint64)  # No word is shorter with what follows.
    nowhere = np.empty(0, np.int64)
    count, _ = hash_words(data, start, stop, table, words, 0, nowhere, nowhere)
    size = min(size, count)
    out = np.empty(count - size + 1 if count else 0, np.uint64)
    for i in range(len(out)):
        out[i] = _shingle(words, i, size)
    return out, count


@njit(cache=True, nogil=True)
def band_keys(data, offsets, table, size, factors, terms, bands, keys, counts):
    """MinHash signatures of texts, as a hash for each band.

    Args:
        data, offsets: UTF-8, uint8, and where each text begins and the last ends, int64.
        size: words a shingle.
        factors, terms: of the hash functions x -> factor * x + term mod 2^32, uint32 [hashes].
        bands: their number; each has hashes / bands functions.
        keys: filled; uint64 [bands + 1, texts]. Row 0: a hash of all words in order.
        counts: filled with the number of words; int64 [texts].
    """
    hashes, rows = len(factors), len(factors) // bands
    signature = np.empty(hashes, np.uint32)
    words = np.empty(_CHUNK + size, np.uint64)
    block = np.empty(_CHUNK + size, np.uint32)
    nowhere = np.empty(0, np.int64)
    for text in range(len(offsets) - 1):
        signature[:] = np.uint32(0xFFFFFFFF)
        i, stop = offsets[text], offsets[text + 1]
        whole, total, kept = _SEED, 0, 0
        while True:
            count, i = hash_words(data, i, stop, table, words, kept, nowhere, nowhere)
            total += count - kept
            for j in range(kept, count):
                whole = mix(whole ^ words[j]) * _PRIME
            if total:
                width = min(size, total)
                number = max(0, count - width + 1)
                for j in range(number):
                    block[j] = np.uint32(_shingle(words, j, width) >> _HIGH)
                _take_minima(signature, block, number, factors, terms)
            if i >= stop:
                break
            kept = size - 1
            words[:kept] = words[count - kept : count].copy()
        counts[text] = total
        keys[0, text] = whole
        for band in range(bands):
            value = _SEED ^ np.uint64(band)
            for j in range(band * rows, (band + 1) * rows):
                value = (value ^ np.uint64(signature[j])) * _PRIME
                value ^= value >> _HIGH
            keys[band + 1, text] = mix(value)


@njit(cache=True, nogil=True)
def _take_minima(signature, block, number, factors, terms):
    # Four shingles at a time, so that the signature is loaded and stored a quarter as often.
    j = 0
    while j + 4 <= number:
        a, b, c, d = block[j], block[j + 1], block[j + 2], block[j + 3]
        for k in range(len(signature)):
            factor, term = factors[k], terms[k]
            w, x = np.uint32(factor * a + term), np.uint32(factor * b + term)
            y, z = np.uint32(factor * c + term), np.uint32(factor * d + term)
            signature[k] = min(signature[k], min(min(w, x), min(y, z)))
        j += 4
    while j < number:
        for k in range(len(signature)):
            signature[k] = min(signature[k], np.uint32(factors[k] * block[j] + terms[k]))
        j += 1


@njit(cache=True, nogil=True)
def jaccards(sets, starts, which, other_sets, other_starts, other_which):
    """Exact Jaccard similarity of pairs of sets, |A & B| / |A | B|.

    Args:
        sets: uint64; set s is sets[starts[s]:starts[s + 1]], sorted, without repeats, not empty.
        which: the first set of each pair; int64 [pairs].
        other_sets, other_starts, other_which: the same of the second.

    Returns:
        float64 [pairs].
    """
    out = np.empty(len(which))
    for n in range(len(which)):
        i, i_end = starts[which[n]], starts[which[n] + 1]
        j, j_end = other_starts[other_which[n]], other_starts[other_which[n] + 1]
        union, shared = (i_end - i) + (j_end - j), 0
        while i < i_end and j < j_end:
            a, b = sets[i], other_sets[j]
            shared += a == b
            i += a <= b
            j += b <= a
        out[n] = shared / (union - shared)
    return out


@njit(cache=True, nogil=True)
def keep_best(order, starts, neighbours, similarity):
    """Choose what is kept of documents of which some are alike, best first.

    Args:
        order: the documents, best first; int64 [documents].
        starts, neighbours, similarity: of document i, neighbours[starts[i]:starts[i + 1]] are the
            documents like it, and how much.

    Returns:
        For each document the kept one that it is most like (of equals the better), or -1: it is
        kept itself, for it is like no document that was kept before. And how much it is like it.
    """
    of = np.full(len(order), -1, np.int64)
    likeness = np.zeros(len(order))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    for document in order:
        for e in range(starts[document], starts[document + 1]):
            other = neighbours[e]
            if rank[other] > rank[document] or of[other] >= 0:
                continue
            best = of[document]
            if (
                best < 0
                or similarity[e] > likeness[document]
                or (similarity[e] == likeness[document] and rank[other] < rank[best])
            ):
                of[document], likeness[document] = other, similarity[e]
    return of, likeness


@njit(cache=True, nogil=True)
def find_grams(data, offsets, table, is_size, grams, filter_bits, found):
    """Find n-grams of texts in a list.

    Args:
        data, offsets, table: as for `band_keys`.
        is_size: bool [largest n + 1], which n there are.
        grams: the hashes to find, as `shingles` gives them; sorted, uint64.
        filter_bits: uint64 [2^k]; bit h mod 2^(k + 6) is set for each h of grams. Saves searching.
        found: int64 [capacity, 4].

    Returns:
        How many were found, for which `found` may be too small: text, which of grams, first byte,
        last byte + 1, each counted from the start of `data`.
    """
    most = len(is_size) - 1
    words = np.empty(_CHUNK + most, np.uint64)
    begins, ends = np.empty(len(words), np.int64), np.empty(len(words), np.int64)
    mask = np.uint64(len(filter_bits) * 64 - 1)
    number = 0
    for text in range(len(offsets) - 1):
        i, stop, kept = offsets[text], offsets[text + 1], 0
        while i < stop:
            count, i = hash_words(data, i, stop, table, words, kept, begins, ends)
            for last in range(kept, count):
                value = _SEED
                for size in range(1, min(most, last + 1) + 1):
                    value = (value ^ words[last - size + 1]) * _PRIME
                    if not is_size[size]:
                        continue
                    gram = mix(value)
                    bit = gram & mask
                    if filter_bits[bit >> np.uint64(6)] >> (bit & np.uint64(63)) & np.uint64(1):
                        place = np.searchsorted(grams, gram)
                        if place < len(grams) and grams[place] == gram:
                            if number < len(found):
                                first = begins[last - size + 1]
                                found[number] = (text, place, first, ends[last])
                            number += 1
            kept = min(count, most - 1)
            words[:kept] = words[count - kept : count].copy()
            begins[:kept] = begins[count - kept : count].copy()
            ends[:kept] = ends[count - kept : count].copy()
    return number
