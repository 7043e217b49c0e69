"""Decodes the bytes of web pages."""

import codecs
import re
from collections.abc import Iterator
from contextlib import suppress

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_META = re.compile(
    rb"<(?:meta|\?xml)\b[^>]{0,512}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)",
    re.I,
)
_META_BYTES = 4096  # The standard says 1024; real pages are later.
_SUPERSETS = {
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}
CONTROLS = bytes({*range(32), 127} - set(b"\t\n\r"))
_FEW_ERRORS = {"utf-8": 0.2}  # Of the characters that are not ASCII.


def decode_page(data: bytes, charset: str | None = None) -> tuple[str, str]:
    """Decodes a page. Returns the text without NUL, and the name of its encoding; never
    fails.

    In this order: a byte order mark; UTF-8 if the data are (nearly) that, whatever is
    declared, since other encodings hardly ever look so; the charset of the HTTP header;
    of a meta tag; a statistical guess by resiliparse. Names mean what the WHATWG
    Encoding Standard says: "iso-8859-1" is cp1252. In HTTP that is a server's default
    more often than the truth, so a meta tag goes before it.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            text = data[len(mark) :].decode(encoding, "replace")
            return text.replace("\0", ""), encoding
    if b"\x1b" not in data:  # ISO-2022-JP is all ASCII, but for escapes.
        with suppress(UnicodeDecodeError):
            return data.replace(b"\0", b"").decode(), "utf-8"
    # The first candidate that fits well, else the one that fits best.
    best_text = ""
    best_encoding = ""
    fewest_errors = 2.0  # More than any share.
    for encoding in _list_candidates(data, charset):
        text = data.decode(encoding, "replace")
        num_foreign = len(text) - len(text.encode("ascii", "ignore"))
        errors = text.count("\ufffd") / num_foreign if num_foreign else 0.0
        if errors < fewest_errors:
            best_text = text
            best_encoding = encoding
            fewest_errors = errors
        if errors <= _FEW_ERRORS.get(encoding, 0.02):
            break
    return best_text.replace("\0", ""), best_encoding


def _list_candidates(data: bytes, charset: str | None) -> Iterator[str]:
    """Yields Python's names of encodings, likeliest first."""
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    # Only what HTML knows: Python also "decodes" base64 and the like.
    def get_known(name: str | None) -> str | None:
        if not name:
            return None
        encoding = map_encoding_to_html5(name, fallback_utf8=False)
        return _SUPERSETS.get(encoding, encoding) if encoding else None

    meta_tag = _META.search(data, 0, _META_BYTES)
    declared = [
        get_known(charset),
        get_known(meta_tag[1].decode() if meta_tag else None),
    ]
    if declared[0] == "cp1252":
        declared.reverse()
    if b"\x1b" not in data:
        declared.insert(0, "utf-8")
    yield from filter(None, declared)
    yield get_known(detect_encoding(data)) or "utf-8"
    yield "cp1252"


def remove_control_characters(text: str) -> str:
    """Removes the code points that no text holds: NUL, other ASCII controls,
    surrogates."""
    return text.encode("utf-8", "ignore").translate(None, CONTROLS).decode()
