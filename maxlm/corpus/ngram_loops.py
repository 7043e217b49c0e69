"""Compiled loops of the n-gram model: adjusted counts, and interpolated probabilities.

Imported only where it runs, as it loads Numba. An n-gram w_1 ... w_k is a
key of k fields of `bits` bits, its last word topmost, in the two uint64 (high, low) that begin a
row of a table, uint64 [rows, columns]. So sorted keys are in suffix order, in which

- the k-gram that ends an N-gram is the key shifted right by (N - k) fields;
- the context w_1 ... w_{k-1} is the key without its top field, and itself a key of order k - 1.
"""

import numpy as np
from numba import njit

BEGIN, END = 1, 2  # The ids of <s> and </s>; 0 is <unk>.
PRUNED = np.uint64(1 << 63)
"""Marks the count of an n-gram that is left out of the model."""
_ONE = np.uint64(1)


@njit(cache=True, nogil=True)
def _shifted(high, low, by):
    """A 128-bit number shifted right by `by` < 128 bits."""
    if by == 0:
        return high, low
    if by >= 64:
        return np.uint64(0), high >> np.uint64(by - 64)
    return high >> np.uint64(by), (low >> np.uint64(by)) | (high << np.uint64(64 - by))


@njit(cache=True, nogil=True)
def take_word(high, low, k, bits):
    """Returns the word w_(k + 1) of an n-gram."""
    _, word = _shifted(high, low, k * bits)
    return np.int64(word & ((_ONE << np.uint64(bits)) - _ONE))


@njit(cache=True, nogil=True)
def _close(k, gram, thresholds, out, sizes, seen):
    """Write the k-gram `gram` (key, raw count, adjusted count) and count it."""
    raw, adjusted = gram[2], gram[3]
    pruned = raw <= thresholds[k - 1] and not (k == 1 and gram[1] <= END)
    out[k - 1, sizes[k - 1], 0], out[k - 1, sizes[k - 1], 1] = gram[0], gram[1]
    out[k - 1, sizes[k - 1], 2] = adjusted | PRUNED if pruned else adjusted
    sizes[k - 1] += 1
    seen[k - 1, min(adjusted, np.uint64(5))] += 1
    if not pruned:
        seen[k - 1, 6] += 1


@njit(cache=True, nogil=True)
def count_adjusted(rows, bits, thresholds, state, depth, out, sizes, seen):
    """Counts n-grams of all orders from full n-grams in suffix order (Heafield 2013, section 3).

    The adjusted count of an n-gram of the highest order, or that begins with <s>, is its count;
    of any other the number of different words to its left. Pruning looks at true counts.

    Args:
        rows: distinct n-grams of order N (key, count), a part of the sorted whole; none after
            the last part, to write what is still open.
        thresholds: uint64 [N]; n-grams with at most so many occurrences are marked.
        state: uint64 [N, 4] (key, count, adjusted count) of the k-grams that end the last row seen,
            which further rows may extend; `depth` of them are in use. Carried on between parts.
        out: uint64 [N, >= len(rows) + 1, 3], gets (key, adjusted count) by order; `sizes` [N] rows.
        seen: int64 [N, 7], adds to the numbers of n-grams with adjusted counts 0, 1, 2, 3, 4, more;
            and to the number not marked.

    Returns:
        The new `depth`.
    """
    order = len(thresholds)
    gram = np.zeros(4, np.uint64)
    for i in range(len(rows)):
        high, low, count = rows[i, 0], rows[i, 1], rows[i, 2]
        # Of several <s> only one is meant: the n-gram is as long as its second word is no <s>.
        length = order
        while length > 1:
            if take_word(high, low, order - length + 1, bits) != BEGIN:
                break
            length -= 1
        same = 0
        while same < depth:
            upper, lower = _shifted(high, low, (order - same - 1) * bits)
            if state[same, 0] != upper or state[same, 1] != lower:
                break
            same += 1
        for k in range(depth, same, -1):
            _close(k, state[k - 1], thresholds, out, sizes, seen)
        for k in range(same):
            state[k, 2] += count
        if same:
            state[same - 1, 3] += _ONE
        depth = min(length, order - 1)
        for k in range(same + 1, depth + 1):
            state[k - 1, 0], state[k - 1, 1] = _shifted(high, low, (order - k) * bits)
            state[k - 1, 2] = count
            state[k - 1, 3] = count if k == length else _ONE
        if length == order:
            gram[0], gram[1], gram[2], gram[3] = high, low, count, count
            _close(order, gram, thresholds, out, sizes, seen)
    if len(rows) == 0:
        for k in range(depth, 0, -1):
            _close(k, state[k - 1], thresholds, out, sizes, seen)
        depth = 0
    return depth


@njit(cache=True, nogil=True)
def compute_kneser_ney_probabilities(
    grams, values, bits, parents, chances, gammas, weights, at, keys, floats
):
    """Computes interpolated probabilities and weights of one order's n-grams that are not marked.

    Args:
        grams: (key, count) in suffix order.
        values: float64 [len(grams), 2]: discounted probability, weight of the lower order.
        parents: (key, probability) of the next lower order in suffix order.
        gammas: (key, weight) of the contexts of the next higher order in suffix order.
        at: int64 [2], how far parents and gammas have been read; carried on between parts.
        keys: uint64 [len(grams), 4], gets (key, probability, weight as a context, 1 for none).
        chances, weights, floats: parents, gammas and keys as float64.

    Returns:
        The number of n-grams written.
    """
    size = 0
    for i in range(len(grams)):
        if grams[i, 2] & PRUNED:
            continue
        high, low = grams[i, 0], grams[i, 1]
        upper, lower = _shifted(high, low, bits)
        p, g = at[0], at[1]
        while parents[p, 0] != upper or parents[p, 1] != lower:
            p += 1
        while g < len(gammas) and (
            gammas[g, 0] < high or (gammas[g, 0] == high and gammas[g, 1] < low)
        ):
            g += 1
        at[0], at[1] = p, g
        extended = g < len(gammas) and gammas[g, 0] == high and gammas[g, 1] == low
        keys[size, 0], keys[size, 1] = high, low
        floats[size, 2] = values[i, 0] + values[i, 1] * chances[p, 2]
        floats[size, 3] = weights[g, 2] if extended else 1.0
        size += 1
    return size
