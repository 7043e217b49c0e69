"""Compiled loops of the n-gram model: keys, radix sort, adjusted counts, probabilities, ARPA lines.

Only imported by functions that need it, since Numba is slow to import. An n-gram w_1 ... w_k is a
key of k fields of `bits` bits, its last word topmost, in the two uint64 (high, low) that begin a
row of a table, uint64 [rows, columns]. So sorted keys are in suffix order, in which

- the k-gram that ends an N-gram is the key shifted right by (N - k) fields;
- the context w_1 ... w_{k-1} is the key without its top field, and itself a key of order k - 1.
"""

import math

import numpy as np
from numba import njit

BEGIN, END = 1, 2  # The ids of <s> and </s>; 0 is <unk>.
PRUNED = np.uint64(1 << 63)
"""Marks the count of an n-gram that is left out of the model."""
_ONE = np.uint64(1)
_NUMBER_BYTES = 16  # At most "-99.0000000", a tab and the like.


@njit(cache=True, nogil=True)
def _shifted(high, low, by):
    """A 128-bit number shifted right by `by` < 128 bits."""
    if by == 0:
        return high, low
    if by >= 64:
        return np.uint64(0), high >> np.uint64(by - 64)
    return high >> np.uint64(by), (low >> np.uint64(by)) | (high << np.uint64(64 - by))


@njit(cache=True, nogil=True)
def _masked(high, low, bits):
    """The low `bits` < 128 bits of a 128-bit number."""
    if bits >= 64:
        return high & ((_ONE << np.uint64(bits - 64)) - _ONE), low
    return np.uint64(0), low & ((_ONE << np.uint64(bits)) - _ONE)


@njit(cache=True, nogil=True)
def word_at(high, low, k, bits):
    """The word w_(k + 1) of an n-gram."""
    _, word = _shifted(high, low, k * bits)
    return np.int64(_masked(np.uint64(0), word, bits)[1])


@njit(cache=True, nogil=True)
def full_ngrams(tokens, first, last, order, bits, rows):
    """Rows [last - first, 3] (key, 1) of the n-grams that end at tokens[first:last].

    Where the sentence has begun less than `order` words before, <s> is repeated to the left.
    """
    step, rest = np.uint64(bits), np.uint64(64 - bits)
    for i in range(first, last):
        high, low, inside = np.uint64(0), np.uint64(0), True
        for j in range(order):
            inside = inside and i >= j and (j == 0 or tokens[i - j] != END)
            word = np.uint64(tokens[i - j]) if inside else np.uint64(BEGIN)
            high = (high << step) | (low >> rest)
            low = (low << step) | word
        rows[i - first, 0], rows[i - first, 1], rows[i - first, 2] = high, low, _ONE


@njit(cache=True, nogil=True)
def radix_sort(rows, spare, bits):
    """Rows in the order of the low `bits` bits of their keys, stable: `rows` or `spare`, sorted."""
    passes = (bits + 7) // 8
    histograms = np.zeros((passes, 256), np.int64)
    for i in range(len(rows)):
        for p in range(passes):
            column, shift = (1, 8 * p) if p < 8 else (0, 8 * p - 64)
            histograms[p, (rows[i, column] >> np.uint64(shift)) & np.uint64(255)] += 1
    for p in range(passes):
        if histograms[p].max() == len(rows):
            continue
        column, shift = (1, 8 * p) if p < 8 else (0, 8 * p - 64)
        places = np.zeros(256, np.int64)
        places[1:] = np.cumsum(histograms[p])[:-1]
        for i in range(len(rows)):
            digit = (rows[i, column] >> np.uint64(shift)) & np.uint64(255)
            for c in range(rows.shape[1]):
                spare[places[digit], c] = rows[i, c]
            places[digit] += 1
        rows, spare = spare, rows
    return rows


@njit(cache=True, nogil=True)
def combine(rows):
    """Adds the counts (third column) of rows with equal keys, in place; how many are left."""
    last = -1
    for i in range(len(rows)):
        if last >= 0 and rows[i, 0] == rows[last, 0] and rows[i, 1] == rows[last, 1]:
            rows[last, 2] += rows[i, 2]
        else:
            last += 1
            rows[last] = rows[i]
    return last + 1


@njit(cache=True, nogil=True)
def lower_bound(rows, high, low):
    """The first of the sorted rows whose key is not below (high, low)."""
    first, last = 0, len(rows)
    while first < last:
        middle = (first + last) // 2
        if rows[middle, 0] < high or (rows[middle, 0] == high and rows[middle, 1] < low):
            first = middle + 1
        else:
            last = middle
    return first


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
def adjusted_counts(rows, bits, thresholds, state, depth, out, sizes, seen):
    """Adjusted counts of all orders from full n-grams in suffix order (Heafield 2013, section 3).

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
            if word_at(high, low, order - length + 1, bits) != BEGIN:
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
def context_rows(grams, first, context_bits, rows):
    """Rows (key of the context, index, count) of the n-grams (key, count) from index `first`."""
    for i in range(len(grams)):
        rows[i, 0], rows[i, 1] = _masked(grams[i, 0], grams[i, 1], context_bits)
        rows[i, 2], rows[i, 3] = np.uint64(first + i), grams[i, 2]


@njit(cache=True, nogil=True)
def discounted(rows, floats, discounts, contexts, weights):
    """Discounted probabilities and interpolation weights (Heafield 2013, equations 1 to 3).

    With pruning, the mass of what is left out goes to the lower order.

    Args:
        rows: (key of the context, index, adjusted count) sorted by context; becomes (0, index,
            discounted probability, weight of the lower order).
        floats: the same memory as float64.
        discounts: float64 [4] of the adjusted counts 0, 1, 2, and more.
        contexts: uint64 [len(rows), 3], gets (key, weight) of the contexts.
        weights: the same memory as float64.

    Returns:
        The number of contexts.
    """
    number, first = 0, 0
    while first < len(rows):
        high, low = rows[first, 0], rows[first, 1]
        last, total, freed = first, 0.0, 0.0
        while last < len(rows) and rows[last, 0] == high and rows[last, 1] == low:
            count = rows[last, 3] & ~PRUNED
            total += count
            freed += count if rows[last, 3] & PRUNED else discounts[min(count, np.uint64(3))]
            last += 1
        for i in range(first, last):
            count = rows[i, 3] & ~PRUNED
            rows[i, 0], rows[i, 1] = np.uint64(0), rows[i, 2]
            floats[i, 2] = (count - discounts[min(count, np.uint64(3))]) / total
            floats[i, 3] = freed / total
        contexts[number, 0], contexts[number, 1] = high, low
        weights[number, 2] = freed / total
        number, first = number + 1, last
    return number


@njit(cache=True, nogil=True)
def interpolated(grams, values, bits, parents, chances, gammas, weights, at, keys, floats, log10s):
    """Interpolated probabilities and backoffs of the n-grams of one order that are not marked.

    Args:
        grams: (key, count) in suffix order.
        values: float64 [len(grams), 2]: discounted probability, weight of the lower order.
        parents: (key, probability) of the next lower order in suffix order.
        gammas: (key, weight) of the contexts of the next higher order in suffix order.
        at: int64 [2], how far parents and gammas have been read; carried on between parts.
        keys: uint64 [len(grams), 3], gets (key, probability).
        chances, weights, floats: parents, gammas and keys as float64.
        log10s: float64 [len(grams), 2], of probability and backoff.

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
        chance = values[i, 0] + values[i, 1] * chances[p, 2]
        keys[size, 0], keys[size, 1] = high, low
        floats[size, 2] = chance
        log10s[size, 0] = _log10(chance)
        log10s[size, 1] = _log10(weights[g, 2]) if extended else 0.0
        size += 1
    return size


@njit(cache=True, nogil=True)
def _log10(x):
    """Never above 0 by rounding; -99 for the logarithm of 0, as ARPA files have it."""
    return min(0.0, math.log10(x)) if x > 0 else -99.0


@njit(cache=True, nogil=True)
def _print_number(number, buffer, at):
    """Write a number <= 0 with seven decimals."""
    scaled = np.int64(-number * 1e7 + 0.5)
    if scaled == 0:
        buffer[at] = 48
        return at + 1
    whole, decimals = scaled // 10_000_000, scaled % 10_000_000
    buffer[at] = 45
    at += 1
    if whole >= 10:
        buffer[at] = 48 + whole // 10
        at += 1
    buffer[at], buffer[at + 1] = 48 + whole % 10, 46
    for d in range(7):
        buffer[at + 8 - d] = 48 + decimals % 10
        decimals //= 10
    return at + 9


@njit(cache=True, nogil=True)
def print_lines(keys, log10s, order, bits, letters, ends, backoffs, buffer):
    """ARPA lines into `buffer`, uint8, until it might be full; (lines written, bytes written).

    Word `w` is letters[ends[w - 1] : ends[w]]; the columns are separated by tabs.
    """
    at, most = 0, 2 * _NUMBER_BYTES
    for i in range(len(keys)):
        size = most
        for k in range(order):
            word = word_at(keys[i, 0], keys[i, 1], k, bits)
            size += ends[word + 1] - ends[word] + 1
        if at + size > len(buffer):
            return i, at
        at = _print_number(log10s[i, 0], buffer, at)
        buffer[at] = 9
        at += 1
        for k in range(order):
            word = word_at(keys[i, 0], keys[i, 1], k, bits)
            for j in range(ends[word], ends[word + 1]):
                buffer[at] = letters[j]
                at += 1
            buffer[at] = 32
            at += 1
        at -= 1
        if backoffs:
            buffer[at] = 9
            at = _print_number(log10s[i, 1], buffer, at + 1)
        buffer[at] = 10
        at += 1
    return len(keys), at
