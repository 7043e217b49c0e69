"""Hot loops of the heuristics stage: the measures of `stages.heuristics`, over UTF-8.

Imported only where it runs, as it loads Numba.
"""

import numpy as np
from numba import njit

from maxlm.corpus.characters import AS_IS, BREAK, DIGIT, LETTER, SPACE, TERMINAL, WORD
from maxlm.corpus.kernels.repetition import (
    find,
    new_set,
    ratio,
    repeated_lines,
    repeated_ngrams,
)
from maxlm.corpus.kernels.text import decode, first_bytes, tokenize

# Columns of `measure`, in the order of `stages.heuristics.LABELS`.
(
    CHARACTERS, WORDS, MEAN_WORD_LENGTH, HASH_RATIO, ELLIPSIS_RATIO, ALPHABETIC_WORDS, STOP_WORDS,
    BULLET_LINES, ELLIPSIS_LINES, DUPLICATE_LINES, DUPLICATE_LINE_CHARS, DUPLICATE_PARAGRAPHS,
    DUPLICATE_PARAGRAPH_CHARS, TOP_2GRAM, _, _, DUPLICATE_5GRAMS, _, _, _, _, _,
    LINE_PUNCT_RATIO, SHORT_LINE_RATIO, CHAR_DUP_RATIO, LIST_RATIO, CURLY_BRACKET, LOREM_IPSUM,
    C4_LINES, C4_SENTENCES, C4_CURLY_BRACKET, C4_LOREM_IPSUM, C4_PUNCTUATED_LINES, C4_SHORT_LINES,
    C4_LONG_WORD_LINES, C4_JAVASCRIPT_LINES, C4_POLICY_LINES, NUM_MEASURES,
) = range(38)  # fmt: skip

_LONG_WORD = 1000  # C4: characters.
_FEWEST_WORDS = 3  # C4: in a line.
_NEWLINE, _RETURN, _DASH, _BULLET = 0x0A, 0x0D, 0x2D, 0x2022


@njit(cache=True, nogil=True)
def measure(offsets, data, classes, stop_words, longest):
    """Every measure of every text.

    Args:
        offsets, data: the texts' UTF-8, int64 [texts + 1] and uint8.
        classes: `characters.character_classes()`.
        stop_words: their hashes, uint64.
        longest: bytes of a text that are looked at.

    Returns:
        float64 [texts, NUM_MEASURES]; what a text does not have is not a number.
    """
    num_texts = len(offsets) - 1
    most = 1
    for row in range(num_texts):
        most = max(most, min(offsets[row + 1] - offsets[row], longest))
    hashes, lengths = np.empty(most, np.uint64), np.empty(most, np.int64)
    kinds, line = np.empty(most, np.uint8), np.empty(most, np.uint8)
    grams = np.empty(most, np.uint64)
    table, stamp = new_set(1024), 0
    stops = new_set(len(stop_words))
    for word in stop_words:
        slot = find(stops, 1, word)
        stops[0][slot], stops[1][slot], stops[2][slot] = word, 1, -1
    out = np.zeros((num_texts, NUM_MEASURES))
    for row in range(num_texts):
        start = offsets[row]
        stop = first_bytes(data, start, offsets[row + 1], longest)
        count, characters = tokenize(data, start, stop, classes, AS_IS, hashes, lengths, kinds)
        out[row, CHARACTERS] = characters
        _words(hashes, lengths, kinds, count, stops, row, out[row])
        newlines = _signs(data, start, stop, count, out[row])
        _lines(data, start, stop, classes, line, out[row])
        # A text has at most one more line than newlines, so one set serves lines and n-grams.
        size = max(count, 1 + newlines)
        if 2 * size > len(table[0]):
            table, stamp = new_set(size), 0
        gopher, fineweb = out[row, DUPLICATE_LINES:TOP_2GRAM], out[row, LINE_PUNCT_RATIO:LIST_RATIO]
        repeated_lines(data, start, stop, classes, characters, table, stamp + 1, gopher, fineweb)
        ngrams = out[row, TOP_2GRAM:LINE_PUNCT_RATIO]
        repeated_ngrams(hashes, lengths, grams, count, characters, table, stamp + 1, ngrams)
        stamp += 11
    return out


@njit(cache=True, nogil=True)
def _words(hashes, lengths, kinds, count, stop_words, row, out):
    """Gopher's measures of words."""
    words, characters, alphabetic, different = 0, 0, 0, 0
    _, stamps, last_row, _ = stop_words
    for i in range(count):
        if kinds[i] & WORD:
            words += 1
            characters += lengths[i]
        alphabetic += kinds[i] & LETTER != 0
        slot = find(stop_words, 1, hashes[i])
        if stamps[slot] and last_row[slot] != row:
            different += 1
            last_row[slot] = row
    out[WORDS] = words
    out[MEAN_WORD_LENGTH] = ratio(characters, words)
    out[ALPHABETIC_WORDS] = ratio(alphabetic, count)
    out[STOP_WORDS] = different


@njit(cache=True, nogil=True)
def _signs(data, start, stop, count, out):
    """Measures of single signs, wherever they stand."""
    newlines, hash_signs, ellipses, dots = 0, 0, 0, 0
    for i in range(start, stop):
        byte = data[i]
        dots = dots + 1 if byte == 0x2E else 0
        if dots == 3:
            ellipses += 1
            dots = 0
        elif byte == _NEWLINE:
            newlines += 1
        elif byte == 0x23:
            hash_signs += 1
        elif byte == 0x7B:
            out[CURLY_BRACKET] = 1
        elif byte == 0xE2:
            ellipses += i + 2 < stop and data[i + 1] == 0x80 and data[i + 2] == 0xA6
        elif byte | 0x20 == 0x6C and _phrases_at(data, i, stop) & _LOREM:
            out[LOREM_IPSUM] = 1
    out[HASH_RATIO] = ratio(hash_signs, count)
    out[ELLIPSIS_RATIO] = ratio(ellipses, count)
    out[LIST_RATIO] = ratio(newlines, count)
    return newlines


# Phrases that C4's code looks for in a line, each a bit.
_PHRASES = (
    b"lorem ipsum", b"javascript", b"terms of use", b"privacy policy", b"cookie policy",
    b"uses cookies", b"use of cookies", b"use cookies",
)  # fmt: skip
_LOREM, _JAVASCRIPT, _POLICY = 1, 2, ~3
_PHRASE_BYTES = np.frombuffer(b"".join(_PHRASES), np.uint8).copy()
_PHRASE_ENDS = np.array([0] + [len(b"".join(_PHRASES[: k + 1])) for k in range(len(_PHRASES))])
_PHRASES_FROM = np.array(
    [sum((p[0] == b) << k for k, p in enumerate(_PHRASES)) for b in range(256)]
)


@njit(cache=True, nogil=True)
def _lower(byte):
    return byte | 0x20 if 0x41 <= byte <= 0x5A else byte


@njit(cache=True, nogil=True)
def _phrases_at(data, i, stop):
    """The phrases that begin at byte i, in any case of ASCII letters: bits."""
    wanted = _PHRASES_FROM[_lower(data[i])]
    found, k = 0, 0
    while wanted >> k:
        if wanted >> k & 1:
            first, last = _PHRASE_ENDS[k], _PHRASE_ENDS[k + 1]
            found |= (i + last - first <= stop and _same(data, i, _PHRASE_BYTES[first:last])) << k
        k += 1
    return found


@njit(cache=True, nogil=True)
def _same(data, i, phrase):
    k = 0
    while k < len(phrase) and _lower(data[i + k]) == phrase[k]:
        k += 1
    return k == len(phrase)


@njit(cache=True, nogil=True)
def _lines(data, start, stop, classes, line, out):
    """Gopher's and C4's measures of lines as `str.splitlines` gives them."""
    lines, reading = 0, True
    i = start
    while i < stop:
        a, b = i, i  # The line is [a, b) without the white space around it.
        words, word, longest_word, blank = 0, 0, 0, True
        opening = np.int64(0)
        while i < stop:
            here = i
            code, i = decode(data, i, stop)
            bits = classes[code]
            if bits & BREAK:
                if code == _RETURN and i < stop and data[i] == _NEWLINE:
                    i += 1
                break
            if bits & SPACE:
                word = 0
                continue
            if blank:
                a, opening, blank = here, code, False
            b = i
            words += word == 0
            word += 1
            longest_word = max(longest_word, word)
        lines += 1
        out[BULLET_LINES] += opening in (_BULLET, _DASH)
        out[ELLIPSIS_LINES] += _ends_in_ellipsis(data, a, b)
        size = _without_citations(data, a, b, classes, line)
        last = line[size - 1] if size else 0
        punctuated = last == 0x2E or last == 0x3F or last == 0x21 or last == 0x22 or last == 0x27
        if size > 2 and last == 0x2E and line[size - 2] == 0x2E and line[size - 3] == 0x2E:
            punctuated = False
        phrases, curly = 0, False
        for k in range(size):
            if _PHRASES_FROM[_lower(line[k])]:
                phrases |= _phrases_at(line, k, size)
            curly |= line[k] == 0x7B
        out[C4_PUNCTUATED_LINES] += punctuated
        out[C4_SHORT_LINES] += words < _FEWEST_WORDS
        out[C4_LONG_WORD_LINES] += longest_word > _LONG_WORD
        out[C4_JAVASCRIPT_LINES] += phrases & _JAVASCRIPT != 0
        out[C4_POLICY_LINES] += phrases & _POLICY != 0
        if punctuated and words >= _FEWEST_WORDS and longest_word <= _LONG_WORD and reading:
            # In the order of C4's code, which gives up on the page at the first such line.
            if phrases & _LOREM:
                out[C4_LOREM_IPSUM] = 1
                reading = False
            elif phrases & _JAVASCRIPT == 0 and curly:
                out[C4_CURLY_BRACKET] = 1
                reading = False
            elif phrases & (_JAVASCRIPT | _POLICY) == 0:
                out[C4_LINES] += 1
                out[C4_SENTENCES] += _sentences(line, size, classes)
    for column in (BULLET_LINES, ELLIPSIS_LINES, C4_PUNCTUATED_LINES, C4_SHORT_LINES,
                   C4_LONG_WORD_LINES, C4_JAVASCRIPT_LINES, C4_POLICY_LINES):  # fmt: skip
        out[column] = ratio(out[column], lines)


@njit(cache=True, nogil=True)
def _ends_in_ellipsis(data, a, b):
    if b - a < 3:
        return False
    x, y, z = data[b - 3], data[b - 2], data[b - 1]
    return (x == 0x2E and y == 0x2E and z == 0x2E) or (x == 0xE2 and y == 0x80 and z == 0xA6)


_EDIT = np.frombuffer(b"[edit]", np.uint8).copy()
_CITATION = np.frombuffer(b"[citation needed]", np.uint8).copy()


@njit(cache=True, nogil=True)
def _without_citations(data, a, b, classes, line):
    r"""Copy a line but for `\[\d*\]|\[edit\]|\[citation needed\]`; how many bytes are left."""
    size = 0
    while a < b:
        after = _after_citation(data, a, b, classes) if data[a] == 0x5B else a
        if after == a:
            line[size] = data[a]
            size += 1
            after = a + 1
        a = after
    return size


@njit(cache=True, nogil=True)
def _after_citation(data, a, b, classes):
    """Where the citation that begins at byte a ends; a if there is none."""
    i = a + 1
    while i < b:
        code, after = decode(data, i, b)
        if code == 0x5D:
            return after
        if classes[code] & DIGIT == 0:
            break
        i = after
    for word in (_EDIT, _CITATION):
        k = 0
        while k < len(word) and a + k < b and data[a + k] == word[k]:
            k += 1
        if k == len(word):
            return a + k
    return a


@njit(cache=True, nogil=True)
def _sentences(line, size, classes):
    """Sentences in a line.

    One ends at marks that end sentences and the quotes and brackets that follow them, before a
    space; marks outside ASCII need no space. A full stop after a single letter ends none: initials,
    e.g., U.S.
    """
    sentences = 0
    pending = False  # Something stands after the last end.
    ended, strong = False, False  # The last mark ends a sentence, or does so without a space.
    before, last = 0, 0  # The classes of the last two characters.
    i = 0
    while i < size:
        code, i = decode(line, i, size)
        bits = classes[code]
        if bits & TERMINAL:
            initial = code == 0x2E and last & LETTER != 0 and before & LETTER == 0
            ended = ended or not initial
            strong = strong or code > 0x7F
            pending = True
        elif not (ended and (code == 0x22 or code == 0x27 or code == 0x29 or code == 0x5D
                             or code == 0x201D or code == 0x2019 or code == 0xBB)):  # fmt: skip
            if ended and (bits & SPACE or strong):
                sentences += 1
                pending = False
            ended, strong = False, False
            pending = pending or bits & SPACE == 0
        before, last = last, bits
    return sentences + pending
