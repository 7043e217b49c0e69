"""Spans cut out of a text, and how what remains is joined.

Between the words on either side of a cut stands the widest break that stood between
them before: of the runs of white space in between, cut or not, the one with the most
line ends (the first of several). So the end of a paragraph stays one, blank lines do
not pile up, and what begins a line or follows on it keeps that line's indentation.
Where there was no white space in between the sides join as they are, but for a space
between two letters or digits of scripts that put spaces between words. A text's own
last white space stays; what is cut at its beginning leaves none.
"""

import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from maxlm.corpus.text import ALONE, get_code_point_classes

CUTS = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))
"""The type of a label that holds spans of a text, in characters."""

_SPACE = re.compile(r"\s+")


def remove_spans(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """`text` without `spans`. `spans`: (start, end) in characters, in any order; they
    may overlap, and what lies outside of the text is passed over."""
    done = 0
    pieces = []
    for start, end in _gaps(text, spans):
        pieces += text[done:start], _joint(text, start, end)
        done = end
    return "".join([*pieces, text[done:]])


def _gaps(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of the spans and of the white space around them, as spans that are
    apart."""
    gaps: list[tuple[int, int]] = []
    for start, end in sorted(
        (max(start, 0), min(end, len(text))) for start, end in spans
    ):
        if start >= end:
            continue
        space = _SPACE.match(text, end)
        end = space.end() if space else end
        while start > 0 and text[start - 1].isspace():
            start -= 1
        if gaps and start <= gaps[-1][1]:
            start, other = gaps.pop()
            end = max(end, other)
        gaps.append((start, end))
    return gaps


def _joint(text: str, start: int, end: int) -> str:
    """Joins what is around text[start:end], which white space neither precedes nor
    follows."""
    gap = text[start:end]
    breaks = _SPACE.findall(gap)
    if end == len(text):
        return breaks[-1] if start and gap[-1].isspace() else ""
    lines = [each for each in breaks if "\n" in each]
    indentation = lines[-1].rpartition("\n")[2] if lines else ""
    if start == 0:
        return indentation
    if lines:
        widest = max(lines, key=lambda each: each.count("\n"))
        return widest[: widest.rindex("\n") + 1] + indentation
    if breaks:
        return breaks[0]
    return " " if _spaced(text[start - 1]) and _spaced(text[end]) else ""


def _spaced(character: str) -> bool:
    """Whether a character belongs to a word of a script with spaces between words."""
    return character.isalnum() and not get_code_point_classes()[ord(character)] & ALONE


def merge_spans(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The union of spans as spans that are apart, rising."""
    order = np.argsort(start)
    start = start[order]
    stop = np.maximum.accumulate(stop[order])
    first = np.append(True, start[1:] > stop[:-1])[: len(start)]
    return start[first], stop[np.append(first[1:], True)[: len(start)]]
