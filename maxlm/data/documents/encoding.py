"""Text that is not valid UTF-8, by the policy `on_bad_bytes`."""

import re

from maxlm.config import MaxlmError
from maxlm.data.documents.config import BadBytes

_FIX = (
    "set on_bad_bytes (data.sources.N.on_bad_bytes of a run, --on-bad-bytes of maxlm corpus build) "
    'to "replace", "keep" or "skip", or convert the text to UTF-8'
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode_text(data: bytes, policy: BadBytes, where: str, offset: int = 0) -> str | None:
    """Decodes UTF-8; returns None where the policy "skip" leaves the text out.

    Under "keep", bytes that are not UTF-8 become U+DC80..U+DCFF ("surrogateescape"), which
    `encode_text` turns back into themselves.

    Args:
        where: the place of `data` for the error; `offset` is added to the offset it names.

    Raises:
        MaxlmError: invalid bytes under the policy "error"; names the first bad byte's offset.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if policy == "error":
            byte, place = error.object[error.start], offset + error.start
            what = f"byte 0x{byte:02x} at offset {place} is not valid UTF-8"
            raise MaxlmError(what, where=where, fix=_FIX) from error
        if policy == "skip":
            return None
        return data.decode("utf-8", "replace" if policy == "replace" else "surrogateescape")


def encode_text(text: str, policy: BadBytes, where: str) -> bytes | None:
    r"""Encodes a string as UTF-8; JSON escapes like "\ud800" can make lone surrogates in it.

    Raises:
        MaxlmError: a lone surrogate under the policy "error".
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        if policy == "error":
            code = ord(text[error.start])
            what = f"character {error.start} is a lone surrogate (U+{code:04X}), not valid UTF-8"
            raise MaxlmError(what, where=where, fix=_FIX) from error
        if policy == "skip":
            return None
        if policy == "replace":
            return _SURROGATE.sub("\ufffd", text).encode()
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def apply_policy(data: bytes, policy: BadBytes, where: str, offset: int = 0) -> bytes | None:
    """Returns `data` if it is valid UTF-8, else what `policy` makes of it; None: left out.

    Raises:
        MaxlmError: invalid bytes under the policy "error".
    """
    text = decode_text(data, policy, where, offset)
    return None if text is None else encode_text(text, policy, where)
