"""Compiled loops that fill the hash tables of KenLM's binary models (see `kenlm_file`)."""

import numpy as np
from numba import njit

from maxlm.corpus.kernels.ngrams import word_at

_MURMUR = np.uint64(0xC6A4A7935BD1E995)
_THIS, _NEXT = np.uint64(8978948897894561157), np.uint64(17894857484156487943)
_SIGN, _HALF, _LOW = np.uint32(1 << 31), np.uint64(32), np.uint64(0xFFFFFFFF)
_MIX, _ONE = np.uint64(47), np.uint64(1)


@njit(cache=True, nogil=True)
def word_hashes(letters, ends):
    """MurmurHash64A with seed 0 of each word letters[ends[i] : ends[i + 1]]: uint64."""
    hashes = np.empty(len(ends) - 1, np.uint64)
    for w in range(len(hashes)):
        first, last = ends[w], ends[w + 1]
        whole = first + (last - first) // 8 * 8
        h = np.uint64(last - first) * _MURMUR
        for i in range(first, whole, 8):
            k = np.uint64(0)
            for j in range(8):
                k |= np.uint64(letters[i + j]) << np.uint64(8 * j)
            k *= _MURMUR
            k = (k ^ (k >> _MIX)) * _MURMUR
            h = (h ^ k) * _MURMUR
        for i in range(whole, last):
            h ^= np.uint64(letters[i]) << np.uint64(8 * (i - whole))
        if whole < last:
            h *= _MURMUR
        h = (h ^ (h >> _MIX)) * _MURMUR
        hashes[w] = h ^ (h >> _MIX)
    return hashes


@njit(cache=True, nogil=True)
def _place(table, key):
    """The row of a key, or the free one where it belongs: linear probing."""
    i = np.int64(key % np.uint64(len(table)))
    while True:
        found = np.uint64(table[i, 0]) | (np.uint64(table[i, 1]) << _HALF)
        if found == key or found == 0:
            return i
        i += 1
        if i == len(table):
            i = 0


@njit(cache=True, nogil=True)
def _put(table, key):
    """The row of a new key, with the key in it."""
    i = _place(table, key)
    table[i, 0], table[i, 1] = np.uint32(key & _LOW), np.uint32(key >> _HALF)
    return i


@njit(cache=True, nogil=True)
def put_words(hashes, table):
    """Rows (hash, id) of words with the ids 1, 2, ...; table: uint32 [buckets, 3]."""
    for w in range(len(hashes)):
        table[_put(table, hashes[w]), 2] = w + 1


@njit(cache=True, nogil=True)
def _extend(node, word):
    return (node * _THIS) ^ ((np.uint64(word) + _ONE) * _NEXT)


@njit(cache=True, nogil=True)
def put_ngrams(keys, values, order, bits, ids, table, lower):
    """Rows (hash, probability, backoff) of n-grams of an order above 1.

    What they extend is marked: a suffix by the sign of its probability taken away, a context by
    the sign of its backoff if that is -0.

    Args:
        keys: as in `kernels.ngrams`.
        values: uint32 [n, 2], the bits of float32 logarithms, with signs.
        ids: uint32, KenLM's ids of words by ours.
        table: uint32 [buckets, 4], for the highest order [buckets, 3] without backoffs.
        lower: the table of the order below; uint32 [words, 2] where that is 1.
    """
    for i in range(len(keys)):
        high, low = keys[i, 0], keys[i, 1]
        first = np.uint64(ids[word_at(high, low, 0, bits)])
        suffix = np.uint64(ids[word_at(high, low, order - 1, bits)])
        context = np.uint64(ids[word_at(high, low, order - 2, bits)])
        for k in range(order - 2, 0, -1):
            suffix = _extend(suffix, ids[word_at(high, low, k, bits)])
            context = _extend(context, ids[word_at(high, low, k - 1, bits)])
        row = _put(table, _extend(suffix, first))
        for c in range(2, table.shape[1]):
            table[row, c] = values[i, c - 2]
        if order == 2:
            lower[suffix, 0] &= ~_SIGN
            if lower[context, 1] == _SIGN:
                lower[context, 1] = 0
        else:
            lower[_place(lower, suffix), 2] &= ~_SIGN
            row = _place(lower, context)
            if lower[row, 3] == _SIGN:
                lower[row, 3] = 0
