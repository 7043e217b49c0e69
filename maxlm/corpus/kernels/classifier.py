"""Hot loops of the text classifier. Imported only where it runs, as it loads Numba."""

import numpy as np
from numba import njit

from maxlm.corpus.characters import SPACE
from maxlm.corpus.kernels.text import decode, first_bytes, mix, tokenize

_LONGEST = 1 << 20  # Bytes of a text that are looked at.
_POWER = np.uint64(0x9FB21C651E98DF25)
_SIZES = np.uint64(0xD6E8FEB86659FD93)  # Tells characters from words.


@njit(cache=True, nogil=True)
def mean_weights(offsets, data, classes, lower, word_ngrams, char_ngrams, weights):
    """The mean weight of each text's features: float64 [texts]; not a number without any."""
    num_texts = len(offsets) - 1
    scratch = _scratch(offsets, word_ngrams, char_ngrams)
    means = np.empty(num_texts)
    for row in range(num_texts):
        count = _features(
            data, offsets[row], offsets[row + 1], classes, lower, word_ngrams, char_ngrams,
            len(weights), scratch,
        )  # fmt: skip
        means[row] = _mean(scratch[0][:count], weights)
    return means


@njit(cache=True, nogil=True)
def features_of(offsets, data, classes, lower, word_ngrams, char_ngrams, buckets):
    """The features of every text.

    Args:
        offsets, data: the texts' UTF-8, int64 [texts + 1] and uint8.
        classes, lower: tables of `characters`.
        word_ngrams: the longest n-grams of words and symbols.
        char_ngrams: characters in n-grams of those, or 0.
        buckets: as a power of two.

    Returns:
        Where each text's features begin, int64 [texts + 1]; the features, int32.
    """
    num_texts = len(offsets) - 1
    scratch = _scratch(offsets, word_ngrams, char_ngrams)
    ends = np.zeros(num_texts + 1, np.int64)
    features = np.empty(1024, np.int32)
    for row in range(num_texts):
        count = _features(
            data, offsets[row], offsets[row + 1], classes, lower, word_ngrams, char_ngrams,
            1 << buckets, scratch,
        )  # fmt: skip
        first, last = ends[row], ends[row] + count
        if last > len(features):
            larger = np.empty(2 * last, np.int32)
            larger[:first] = features[:first]
            features = larger
        features[first:last] = scratch[0][:count]
        ends[row + 1] = last
    return ends, features[: ends[-1]].copy()


@njit(cache=True, nogil=True)
def _scratch(offsets, word_ngrams, char_ngrams):
    """Room for the longest text: features, hashes, lengths, kinds."""
    size = 1
    for row in range(len(offsets) - 1):
        size = max(size, min(offsets[row + 1] - offsets[row], _LONGEST))
    room = size * (word_ngrams + (char_ngrams > 0))
    features, lengths = np.empty(room, np.int32), np.empty(size, np.int64)
    return features, np.empty(size, np.uint64), lengths, np.empty(size, np.uint8)


@njit(cache=True, nogil=True)
def _features(
    data, start, stop, classes, lower, word_ngrams, char_ngrams, num_buckets, scratch
):  # fmt: skip
    features, hashes, lengths, kinds = scratch
    last = np.uint64(num_buckets - 1)
    stop = first_bytes(data, start, stop, _LONGEST)
    tokens, _ = tokenize(data, start, stop, classes, lower, hashes, lengths, kinds)
    count = 0
    for i in range(tokens):
        value = np.uint64(0)
        for n in range(min(word_ngrams, tokens - i)):
            value = value * _POWER + hashes[i + n]
            features[count] = mix(value) & last
            count += 1
    if char_ngrams:
        # Hashes are done with, and serve as the last characters since a space.
        run, i = 0, start
        while i < stop:
            code, i = decode(data, i, stop)
            if classes[code] & SPACE:
                run = 0
                continue
            hashes[run] = np.uint64(lower[code] if code < len(lower) else code)
            run += 1
            if run >= char_ngrams:
                value = _SIZES
                for k in range(run - char_ngrams, run):
                    value = value * _POWER + hashes[k]
                features[count] = mix(value) & last
                count += 1
    return count


@njit(cache=True, nogil=True)
def _mean(features, weights):
    total = 0.0
    for feature in features:
        total += weights[feature]
    return total / len(features) if len(features) else np.nan


@njit(cache=True, nogil=True)
def mean_of(ends, features, weights):
    """The mean weight of each document's features: float64 [documents]; 0 without any."""
    means = np.zeros(len(ends) - 1)
    for row in range(len(means)):
        if ends[row + 1] > ends[row]:
            means[row] = _mean(features[ends[row] : ends[row + 1]], weights)
    return means


@njit(cache=True, nogil=True)
def train_epoch(order, ends, features, labels, rarity, weights, squares, bias, learning_rate):
    """One pass of AdaGrad over the documents in `order`; changes weights, squares and bias.

    Args:
        labels: bool [documents].
        rarity: what a document of kind 0 or 1 weighs, float64 [2].
        squares: sums of squared gradients, like weights.
        bias: of the score, and its sum of squared gradients: float64 [2].
    """
    for row in order:
        found = features[ends[row] : ends[row + 1]]
        if len(found) == 0:
            continue
        label = int(labels[row])
        score = bias[0] + _mean(found, weights)
        gradient = rarity[label] * (1 / (1 + np.exp(-score)) - label)
        bias[1] += gradient**2
        bias[0] -= learning_rate * gradient / np.sqrt(bias[1])
        gradient /= len(found)
        for feature in found:
            squares[feature] += gradient**2
            weights[feature] -= learning_rate * gradient / np.sqrt(squares[feature] + 1e-20)
