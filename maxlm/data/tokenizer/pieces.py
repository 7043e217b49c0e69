"""What one token of a Hugging Face tokenizer says, as its decoder would say it among others.

The `tokenizers` library decodes whole sequences. Every decoder here treats tokens one by one, but
for the first of a text (whose leading space may be one that the encoder put there): so each id has
bytes of its own, and text can be streamed. Any other decoder is refused.
"""

import re
from collections.abc import Callable
from typing import Any

from maxlm.config import MaxlmError

Spelling = str | bytes
"""A token on its way through the steps: bytes once no later step may see characters in it."""

Step = Callable[[Spelling, bool], Spelling]
"""(token, whether it opens the text) -> what the next step sees."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# The WordPiece decoder's tidying of English, in its order.
_TIDY = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's convention).

    Visible Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def flatten(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre_tokenizer or decoder of tokenizer.json as the list of its steps."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    (children,) = (value for key, value in part.items() if key != "type")
    return [step for child in children for step in flatten(child)]


def decoder_steps(decoder: dict[str, Any] | None) -> tuple[Step, ...]:
    """The steps of a decoder.

    Raises:
        MaxlmError: it does not treat tokens one by one.
    """
    if decoder is None:
        return (_spaced,)
    steps: list[Step] = []
    joined = False  # Whether the library has made one string of all tokens.
    for part in flatten(decoder):
        match part:
            case {"type": "ByteLevel"}:
                steps.append(_byte_level())
                joined = True
            case {"type": "Fuse"}:
                joined = True
            case {"type": "ByteFallback"} if not joined:
                steps.append(_byte_fallback)
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if (
                len(old) == 1 or not joined
            ):
                steps.append(_replace(old, new))
            case {"type": "Strip", "start": 0, "stop": 0}:
                pass
            case {"type": "Strip", "content": char, "start": 1, "stop": 0} if joined:
                steps.append(_strip_first(char))
            case {"type": "Metaspace", "replacement": mark} if not joined:
                steps.append(_metaspace(mark, prepends(part)))
            case {"type": "WordPiece", "prefix": prefix, "cleanup": tidy} if not joined:
                steps.append(_word_piece(prefix, tidy))
            case _:
                raise MaxlmError(
                    f"maxlm cannot decode token by token with the decoder {part['type']}",
                    where="tokenizer.json",
                    fix="use a model whose tokenizer has one of ByteLevel, Metaspace, WordPiece "
                    "or Replace + ByteFallback + Fuse",
                )
    return tuple(steps)


def spell(steps: tuple[Step, ...], token: Spelling, *, first: bool) -> bytes:
    """The bytes of a token."""
    for step in steps:
        token = step(token, first)
    return token.encode() if isinstance(token, str) else token


def prepends(metaspace: dict[str, Any]) -> bool:
    """Whether a Metaspace step puts its mark before a text (files before 2024 say it otherwise)."""
    if metaspace.get("add_prefix_space") is False:
        return False
    return metaspace.get("prepend_scheme", "always") != "never"


def _spaced(token: Spelling, first: bool) -> Spelling:
    if first:
        return token
    return f" {token}" if isinstance(token, str) else b" " + token


def _byte_level() -> Step:
    of_char = {char: byte for byte, char in enumerate(byte_alphabet())}

    def step(token: Spelling, first: bool) -> Spelling:
        if isinstance(token, str) and all(char in of_char for char in token):
            return bytes(of_char[char] for char in token)
        return token.encode() if isinstance(token, str) else token

    return step


def _byte_fallback(token: Spelling, first: bool) -> Spelling:
    found = _BYTE.fullmatch(token) if isinstance(token, str) else None
    return bytes([int(found[1], 16)]) if found else token


def _replace(old: str, new: str) -> Step:
    return lambda token, first: token.replace(old, new) if isinstance(token, str) else token


def _strip_first(char: str) -> Step:
    def step(token: Spelling, first: bool) -> Spelling:
        if not first:
            return token
        if isinstance(token, str):
            return token.removeprefix(char)
        return token.removeprefix(char.encode())

    return step


def _metaspace(mark: str, prepended: bool) -> Step:
    def step(token: Spelling, first: bool) -> Spelling:
        if isinstance(token, bytes):
            return token
        # All marks of the first token, as the library does: a text that begins with spaces loses
        # those that its first token holds.
        return token.replace(mark, "" if first and prepended else " ")

    return step


def _word_piece(prefix: str, tidy: bool) -> Step:
    def step(token: Spelling, first: bool) -> Spelling:
        if isinstance(token, str) and not first and token.startswith(prefix):
            token = token.replace(prefix, "", 1)
        else:
            token = _spaced(token, first)
        if tidy and isinstance(token, str):
            for old, new in _TIDY:
                token = token.replace(old, new)
        return token

    return step
