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


def decode(data: bytes, charset: str | None = None) -> tuple[str, str]:
    """Returns the text without NUL, and the name of its encoding; never fails.

    In this order: a byte order mark; UTF-8 if the data are (nearly) that, whatever is
    declared, since other encodings hardly ever look so; the charset of the HTTP header;
    of a meta tag; a statistical guess by resiliparse. Names mean what the WHATWG
    Encoding Standard says: "iso-8859-1" is cp1252. In HTTP that is a server's default
    more often than the truth, so a meta tag goes before it.
    """
    for bom, name in _BOMS:
        if data.startswith(bom):
            return data[len(bom) :].decode(name, "replace").replace("\0", ""), name
    if b"\x1b" not in data:  # ISO-2022-JP is all ASCII, but for escapes.
        with suppress(UnicodeDecodeError):
            return (
                data.replace(b"\0", b"") if b"\0" in data else data
            ).decode(), "utf-8"
    text, name, least = "", "", 2.0
    for candidate in _candidates(data, charset):
        tried = data.decode(candidate, "replace")
        foreign = len(tried) - len(tried.encode("ascii", "ignore"))
        errors = tried.count("\ufffd") / foreign if foreign else 0.0
        if errors < least:
            text, name, least = tried, candidate, errors
        if errors <= _FEW_ERRORS.get(candidate, 0.02):
            break
    return text.replace("\0", ""), name


def _candidates(data: bytes, charset: str | None) -> Iterator[str]:
    """Python's names of encodings, likeliest first."""
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    def known(
        name: str | None,
    ) -> str | None:  # Python also "decodes" base64 and the like.
        name = map_encoding_to_html5(name, fallback_utf8=False) if name else None
        return _SUPERSETS.get(name, name) if name else None

    meta = _META.search(data, 0, _META_BYTES)
    declared = [known(charset), known(meta[1].decode() if meta else None)]
    if declared[0] == "cp1252":
        declared.reverse()
    if b"\x1b" not in data:
        declared.insert(0, "utf-8")
    yield from filter(None, declared)
    yield known(detect_encoding(data)) or "utf-8"
    yield "cp1252"


def remove_control_characters(text: str) -> str:
    """Removes the code points that no text holds: NUL, other ASCII controls,
    surrogates."""
    return text.encode("utf-8", "ignore").translate(None, CONTROLS).decode()
