"""The policy for text that is not valid UTF-8."""

import re

from maxlm.config import MaxlmError
from maxlm.corpus.config import BadBytes

_FIX = (
    "set on_bad_bytes (data.sources.N.on_bad_bytes of a run, --on-bad-bytes of maxlm corpus build) "
    'to "replace", "keep" or "skip", or convert the text to UTF-8'
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def apply_policy(data: bytes, policy: BadBytes, where: str) -> bytes | None:
    """`data` if it is valid UTF-8, else what `policy` makes of it (None: leave it out).

    Raises:
        MaxlmError: invalid bytes under the policy "error"; names the first bad byte's offset.
    """
    try:
        data.decode()
        return data
    except UnicodeDecodeError as error:
        if policy == "error":
            raise bad_byte(error, where) from error
        if policy == "replace":
            return data.decode("utf-8", "replace").encode()
        return data if policy == "keep" else None


def bad_byte(error: UnicodeDecodeError, where: str) -> MaxlmError:
    """The error that names an undecodable byte and its offset from `where`'s start."""
    byte = error.object[error.start]
    what = f"byte 0x{byte:02x} at offset {error.start} is not valid UTF-8"
    return MaxlmError(what, where=where, fix=_FIX)


def encode_json_text(text: str, policy: BadBytes, where: str) -> bytes | None:
    r"""UTF-8 of a string out of JSON, where escapes like "\ud800" can make lone surrogates.

    Bytes of the file that were not UTF-8 arrive as U+DC80..U+DCFF ("surrogateescape") and turn
    into themselves under "keep".

    Raises:
        MaxlmError: a lone surrogate under the policy "error".
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if policy == "error":
            what = f"character {error.start} is a lone surrogate (U+{code:04X}), not valid UTF-8"
            raise MaxlmError(what, where=where, fix=_FIX) from error
        if policy == "replace":
            return _SURROGATE.sub("\ufffd", text).encode()
        return _keep(text) if policy == "keep" else None


def _keep(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
