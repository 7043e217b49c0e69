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
from typing import TypedDict

import numpy as np
import pyarrow as pa

from maxlm.corpus.text import ALONE, get_code_point_classes

CUTS = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))
"""The type of a label that holds spans of a text, in characters."""
_SPACE = re.compile(r"\s+")


class TextSpan(TypedDict):
    """A value in such a label."""

    start: int
    """The first character."""
    end: int
    """The character after the last."""


def get_span_edges(spans: Iterable[TextSpan]) -> list[tuple[int, int]]:
    """Returns the spans of a label as (start, end)."""
    return [(span["start"], span["end"]) for span in spans]


def remove_spans(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """Returns `text` without `spans`. `spans`: (start, end) in characters, in any
    order; they may overlap, and what lies outside of the text is passed over."""
    pieces = []
    done = 0
    for start, end in _merge_gaps(text, spans):
        pieces.append(text[done:start])
        pieces.append(_choose_joint(text, start, end))
        done = end
    pieces.append(text[done:])
    return "".join(pieces)


def _merge_gaps(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the union of the spans and of the white space around them, as spans that
    are apart."""
    gaps: list[tuple[int, int]] = []
    inside = sorted((max(start, 0), min(end, len(text))) for start, end in spans)
    for start, end in inside:
        if start >= end:
            continue
        space = _SPACE.match(text, end)
        if space:
            end = space.end()
        while start > 0 and text[start - 1].isspace():
            start -= 1
        if gaps and start <= gaps[-1][1]:
            start, last_end = gaps.pop()
            end = max(end, last_end)
        gaps.append((start, end))
    return gaps


def _choose_joint(text: str, start: int, end: int) -> str:
    """Chooses what joins the text on both sides of text[start:end], which white space
    neither precedes nor follows."""
    gap = text[start:end]
    breaks = _SPACE.findall(gap)
    if end == len(text):
        # The text's own last white space stays, if anything is left before it.
        ends_in_space = gap[-1].isspace()
        return breaks[-1] if start and ends_in_space else ""
    line_breaks = [space for space in breaks if "\n" in space]
    indentation = line_breaks[-1].rpartition("\n")[2] if line_breaks else ""
    if start == 0:
        return indentation
    if line_breaks:
        widest = max(line_breaks, key=lambda space: space.count("\n"))
        return widest[: widest.rindex("\n") + 1] + indentation
    if breaks:
        return breaks[0]
    if _is_spaced(text[start - 1]) and _is_spaced(text[end]):
        return " "
    return ""


def _is_spaced(character: str) -> bool:
    """Tells whether a character belongs to a word of a script with spaces between
    words."""
    is_alone = get_code_point_classes()[ord(character)] & ALONE
    return character.isalnum() and not is_alone


def merge_spans(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges spans; returns their union as spans that are apart, rising."""
    order = np.argsort(start)
    start = start[order]
    furthest_stop = np.maximum.accumulate(stop[order])
    # A span opens a new one where it begins behind all before it. The slices are for no
    # spans at all.
    opens = np.append(True, start[1:] > furthest_stop[:-1])[: len(start)]
    closes = np.append(opens[1:], True)[: len(start)]
    return start[opens], furthest_stop[closes]
