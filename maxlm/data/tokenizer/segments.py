"""Cutting a text into what a tokenizer library encodes faithfully and what it would mangle.

The libraries take valid Unicode only, and SentencePiece confuses U+2581 with a space. Those
stretches become ``bytes`` segments, which turn into byte tokens one for one without passing
through the library; everything else stays a ``str`` segment. Long ones are cut further where no
token can straddle the cut, so that one huge document still uses every core and bounded memory.
"""

import re
from collections.abc import Iterator

SEGMENT_CHARS = 16_384


def split_segments(text: str | bytes, *, reserved: str, cut: re.Pattern[str]) -> list[str | bytes]:
    """Segments whose UTF-8 bytes, joined, are the text's.

    Args:
        text: any text; lone surrogates in a str stand for their three (invalid) UTF-8 bytes.
        reserved: characters the library would not give back as they are.
        cut: matches, with an end that is a safe place to cut, somewhere in most texts.
    """
    valid, clean = _to_str(text)
    if clean and not any(char in valid for char in reserved):
        return list(cut_long(valid, SEGMENT_CHARS, cut))
    segments: list[str | bytes] = []
    # The group makes every odd part a stretch to be passed on as bytes.
    for i, part in enumerate(re.split(f"([\ud800-\udfff{reserved}]+)", valid)):
        if i % 2:
            segments.append(part.encode("utf-8", "surrogateescape"))
        elif part:
            segments.extend(cut_long(part, SEGMENT_CHARS, cut))
    return segments


def cut_long(text: str, limit: int, cut: re.Pattern[str]) -> Iterator[str]:
    """Pieces of ``text`` that end at the first cut after ``limit`` characters."""
    start = 0
    while len(text) - start > limit and (found := cut.search(text, start + limit)):
        yield text[start : found.end()]
        start = found.end()
    if start < len(text):
        yield text[start:]


def valid_text(text: str | bytes) -> str:
    """The text with U+FFFD for whatever is not valid UTF-8."""
    valid, clean = _to_str(text)
    return valid if clean else valid.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _to_str(text: str | bytes) -> tuple[str, bool]:
    """The text with each stray byte as a surrogate in U+DC80..U+DCFF, and whether there is none."""
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8"), True
        except UnicodeDecodeError:
            return text.decode("utf-8", "surrogateescape"), False
    try:
        text.encode("utf-8")
        return text, True
    except UnicodeEncodeError:
        return _to_str(text.encode("utf-8", "surrogatepass"))
