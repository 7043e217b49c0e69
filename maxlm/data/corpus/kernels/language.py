"""The loop of language identification: fastText's scores of documents and of their paragraphs.

Same numbers as fastText's `predict`, but in one pass over an Arrow batch: a paragraph's sum of
embeddings is also a part of its document's, and a word that was seen before is not hashed n-gram
by n-gram again. One word is read otherwise: at `</s>` fastText takes the line to end and reads no
further; here it is a word like others.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from maxlm.data.corpus.fasttext_file import Classifier

_SLOT_BITS = 14  # 2^14 words are remembered within a call: 1.2 MB, about a core's cache.
_BEGIN, _END = 60, 62  # fastText puts every word between < and >.
_LABEL = np.frombuffer(b"__label__", np.uint8).copy()


class Tables(NamedTuple):
    """A classifier laid out for the loop."""

    rows: np.ndarray
    """Embeddings of words, then of n-grams in the order of their hashes: float32 [rows, dim]."""
    present: np.ndarray
    """Bits that say which hashes have a row: uint64 [buckets / 64]; stays in cache."""
    ranks: np.ndarray
    """The row after the last one that a word of `present` stands for: int32 [buckets / 64]."""
    keys: np.ndarray
    """Open-addressed table of words by hash: uint64 [2^k], 0: free."""
    key_rows: np.ndarray
    nodes: np.ndarray
    left: np.ndarray
    right: np.ndarray
    end_of_line: np.ndarray
    """The row that fastText adds at the end of each text: float32 [dim]."""
    buckets: int
    min_n: int
    max_n: int


class Scores(NamedTuple):
    """Labels by number, -1: no letter or digit to go by."""

    label: np.ndarray
    score: np.ndarray
    second: np.ndarray
    second_score: np.ndarray
    share: np.ndarray
    """Part of the document's characters that lie in spans of its own label."""
    offsets: np.ndarray
    """Document i has spans offsets[i] to offsets[i + 1]."""
    start: np.ndarray
    end: np.ndarray
    """Characters within the document."""
    span_label: np.ndarray
    span_score: np.ndarray


def build_tables(model: Classifier) -> Tables:
    """Lay out a classifier for `score`."""
    size = 1 << (2 * len(model.words)).bit_length()
    keys, key_rows = np.zeros(size, np.uint64), np.zeros(size, np.int32)
    for word, row in model.words.items():
        key = int(_hash_word(np.frombuffer(word + b" ", np.uint8), 0, len(word)))
        slot = key % size
        while keys[slot]:
            slot = (slot + 1) % size
        keys[slot], key_rows[slot] = key, row
    buckets, num_words = len(model.ngram_rows), len(model.words)
    present = np.zeros((-(-buckets // 64), 64), np.bool_)
    present.ravel()[:buckets] = model.ngram_rows >= 0
    ngrams = model.ngram_rows[model.ngram_rows >= 0]
    return Tables(
        np.concatenate([model.rows[:num_words], model.rows[ngrams]]),
        np.packbits(present, bitorder="little").view(np.uint64),
        (num_words + np.cumsum(present.sum(1))).astype(np.int32),
        keys,
        key_rows,
        model.nodes.copy(),
        model.left,
        model.right,
        model.rows[model.words[b"</s>"]].copy(),
        buckets,
        model.min_n,
        model.max_n,
    )


@njit(cache=True, nogil=True, inline="always")
def _is_space(byte):
    return byte == 32 or 9 <= byte <= 13 or byte == 0


@njit(cache=True, nogil=True)
def _hash_word(data, start, end):
    """FNV-1a of 64 bits, never 0."""
    value = np.uint64(14695981039346656037)
    for i in range(start, end):
        value = (value ^ np.uint64(data[i])) * np.uint64(1099511628211)
    return value | np.uint64(1)


@njit(cache=True, nogil=True)
def _count_bits(x):
    """Bits set in a word of 64, by adding neighbours in pairs, fours, eights, all."""
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(cache=True, nogil=True)
def _is_label(data, start, end):
    """Whether a word begins as fastText marks labels, which it passes over in texts."""
    k = 0
    while k < len(_LABEL) and start + k < end and data[start + k] == _LABEL[k]:
        k += 1
    return k == len(_LABEL)


@njit(cache=True, nogil=True)
def _embed_word(tables, data, start, end, key, total):
    """Add the rows of a word and its n-grams to `total`, float32 [dim]; how many they are."""
    if _is_label(data, start, end):
        return 0
    count = 0
    size = np.uint64(len(tables.keys))
    slot = key % size
    while tables.keys[slot]:
        if tables.keys[slot] == key:
            count += 1
            for k in range(len(tables.end_of_line)):
                total[k] += tables.rows[tables.key_rows[slot], k]
            break
        slot = (slot + np.uint64(1)) % size
    buckets = np.uint32(tables.buckets)
    for i in range(start - 1, end + 1):
        if start <= i < end and data[i] & 0xC0 == 0x80:
            continue
        value = np.uint32(2166136261)
        j = i
        for n in range(1, tables.max_n + 1):
            if j > end:
                break
            while True:  # One character: a byte and those that continue it.
                byte = _BEGIN if j < start else _END if j == end else data[j]
                # fastText hashes signed bytes.
                signed = np.uint32(byte) | (np.uint32(0xFFFFFF00) * np.uint32(byte >> 7))
                value = np.uint32((value ^ signed) * np.uint32(16777619))
                j += 1
                if j >= end or data[j] & 0xC0 != 0x80:
                    break
            if n < tables.min_n or (n == 1 and (i < start or j > end)):
                continue
            bucket = value % buckets
            word = bucket >> 6
            bits = tables.present[word] >> np.uint64(bucket & 63)
            if bits & np.uint64(1):
                row = tables.ranks[word] - _count_bits(bits)
                for k in range(len(tables.end_of_line)):
                    total[k] += tables.rows[row, k]
                count += 1
    return count


@njit(cache=True, nogil=True)
def _best_two(tables, hidden, best):
    """The two likeliest leaves of the tree into `best`, float64 [2, 2] of (label, probability).

    A node's probability bounds those below it, so most of the tree is never looked at.
    """
    labels = len(tables.nodes) + 1
    best[:, 0], best[:, 1] = -1, 0.0
    stack_node, stack_score = np.empty(labels, np.int32), np.empty(labels)
    stack_node[0], stack_score[0] = 2 * labels - 2, 1.0
    size = 1
    while size:
        size -= 1
        node, score = stack_node[size], stack_score[size]
        if score <= best[1, 1]:
            continue
        if node < labels:
            if score > best[0, 1]:
                best[1] = best[0]
                best[0, 0], best[0, 1] = node, score
            else:
                best[1, 0], best[1, 1] = node, score
            continue
        inner = node - labels
        dot = 0.0
        for k in range(len(tables.end_of_line)):
            dot += tables.nodes[inner, k] * hidden[k]
        go_right = 1.0 / (1.0 + np.exp(-dot))
        # fastText's log(x + 1e-5), left as a product.
        right, left = score * (go_right + 1e-5), score * (1.0 - go_right + 1e-5)
        first = tables.left[inner] if right > left else tables.right[inner]
        second = tables.right[inner] if right > left else tables.left[inner]
        stack_node[size], stack_score[size] = first, min(left, right)
        stack_node[size + 1], stack_score[size + 1] = second, max(left, right)
        size += 2


@njit(cache=True, nogil=True)
def _label(tables, total, count, best):
    """The best two labels of a text whose embeddings sum up to `total`."""
    if count == 0:
        best[:, 0], best[:, 1] = -1, 0.0
        return
    hidden = np.empty(len(tables.end_of_line))
    for k in range(len(tables.end_of_line)):
        hidden[k] = (total[k] + tables.end_of_line[k]) / (count + 1)
    _best_two(tables, hidden, best)


@njit(cache=True, nogil=True)
def score(tables, data, text_offsets, paragraph_characters):
    """Label the texts of a batch, and their paragraphs.

    Args:
        tables: see `Tables`.
        data: UTF-8 of all texts: uint8 [bytes].
        text_offsets: text i is data[text_offsets[i] : text_offsets[i + 1]].
        paragraph_characters: lines are joined until they have as many characters.

    Returns:
        See `Scores`.
    """
    num, dim = len(text_offsets) - 1, tables.rows.shape[1]
    labels, seconds = np.full(num, -1, np.int32), np.full(num, -1, np.int32)
    scores, second_scores = np.zeros(num, np.float32), np.zeros(num, np.float32)
    shares, offsets = np.zeros(num), np.zeros(num + 1, np.int32)
    most = num
    for i in range(text_offsets[0], text_offsets[num]):
        most += data[i] == 10
    starts, ends = np.empty(most, np.int32), np.empty(most, np.int32)
    span_labels, span_scores = np.empty(most, np.int32), np.empty(most, np.float32)
    slots = 1 << _SLOT_BITS
    cached, cached_counts = np.zeros(slots, np.uint64), np.empty(slots, np.int32)
    cached_sums = np.empty((slots, dim), np.float32)
    best, spans = np.empty((2, 2)), 0
    paragraph, document = np.empty(dim), np.empty(dim)
    for text in range(num):
        first, i, end = spans, text_offsets[text], text_offsets[text + 1]
        document[:], paragraph[:] = 0.0, 0.0
        document_count, paragraph_count, begin, characters = 0, 0, 0, 0
        while i <= end:
            if i == end or data[i] == 10:
                characters += i < end
                long = characters - begin >= paragraph_characters
                if i == end and spans > first and not (long and paragraph_count):
                    ends[spans - 1] = characters  # The rest is too short to be told by itself.
                elif paragraph_count and (long or i == end):
                    _label(tables, paragraph, paragraph_count, best)
                    if spans > first and span_labels[spans - 1] == best[0, 0]:
                        weight = (characters - begin) / (characters - starts[spans - 1])
                        span_scores[spans - 1] += weight * (best[0, 1] - span_scores[spans - 1])
                        ends[spans - 1] = characters
                    else:
                        starts[spans], ends[spans] = begin, characters
                        span_labels[spans], span_scores[spans] = best[0, 0], best[0, 1]
                        spans += 1
                    begin = characters
                if begin == characters or i == end:
                    for k in range(dim):
                        document[k] += paragraph[k]
                        paragraph[k] = 0.0
                    document_count += paragraph_count
                    paragraph_count = 0
                i += 1
                continue
            if _is_space(data[i]):
                characters += 1
                i += 1
                continue
            j, key = i, np.uint64(14695981039346656037)
            while j < end and not _is_space(data[j]):
                key = (key ^ np.uint64(data[j])) * np.uint64(1099511628211)
                characters += data[j] & 0xC0 != 0x80
                j += 1
            key |= np.uint64(1)
            slot = np.int64(key >> np.uint64(64 - _SLOT_BITS))
            if cached[slot] != key:
                cached[slot] = key
                cached_sums[slot] = 0.0
                cached_counts[slot] = _embed_word(tables, data, i, j, key, cached_sums[slot])
            for k in range(len(tables.end_of_line)):
                paragraph[k] += cached_sums[slot, k]
            paragraph_count += cached_counts[slot]
            i = j
        offsets[text + 1] = spans
        _label(tables, document, document_count, best)
        labels[text], scores[text] = best[0]
        seconds[text], second_scores[text] = best[1]
        own = 0
        for span in range(first, spans):
            if span_labels[span] == labels[text]:
                own += ends[span] - starts[span]
        shares[text] = own / characters if characters else 0.0
    return Scores(
        labels,
        scores,
        seconds,
        second_scores,
        shares,
        offsets,
        starts[:spans],
        ends[:spans],
        span_labels[:spans],
        span_scores[:spans],
    )
