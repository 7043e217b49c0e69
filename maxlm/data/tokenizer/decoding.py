"""The bytes of single tokens of a Hugging Face tokenizer.

The `tokenizers` library decodes whole sequences. The decoders taken here treat tokens one by one,
but for the first of a text (whose leading space may be one that the encoder put there): so each id
has bytes of its own, and text can be streamed. Any other decoder is refused.
"""

import re
from typing import Any

from maxlm.config import MaxlmError

_HIGH_BYTE = re.compile(r"<0x([89A-Fa-f][0-9A-Fa-f])>")


def build_byte_alphabet() -> list[str]:
    """Returns the character of each byte in byte-level vocabularies (GPT-2's convention).

    Visible Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def flatten_steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer, pre_tokenizer or decoder of tokenizer.json."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    (children,) = (value for key, value in part.items() if key != "type")
    return [step for child in children for step in flatten_steps(child)]


def has_prefix_space(metaspace: dict[str, Any]) -> bool:
    """Whether a Metaspace step marks a text's beginning (files before 2024 spell it otherwise)."""
    if metaspace.get("add_prefix_space") is False:
        return False
    return metaspace.get("prepend_scheme", "always") != "never"


class TokenDecoder:
    """Decodes single tokens.

    Args:
        library: the ``tokenizers`` decoder, or None.
        spec: the decoder in tokenizer.json.

    Raises:
        MaxlmError: the decoder does not treat tokens one by one.
    """

    def __init__(self, library: Any, spec: dict[str, Any] | None):
        self._library = library
        kinds = _check_decoder(spec)
        self._bytes = "ByteFallback" in kinds
        self._spaced = not kinds or "WordPiece" in kinds
        alphabet = build_byte_alphabet() if "ByteLevel" in kinds else []
        self._byte_of_char = {char: byte for byte, char in enumerate(alphabet)}

    def decode(self, token: str, *, first: bool, is_added: bool = False) -> bytes:
        """Returns a token's bytes, at the beginning of a text or within it.

        Args:
            is_added: the model does not know the token: it is no piece of its alphabet, but text.
        """
        if is_added or self._library is None:
            return (f" {token}" if self._spaced and not first else token).encode()
        if self._byte_of_char:
            known = all(char in self._byte_of_char for char in token)
            return bytes(self._byte_of_char[char] for char in token) if known else token.encode()
        if self._bytes and (found := _HIGH_BYTE.fullmatch(token)):
            return bytes([int(found[1], 16)])
        if first:
            return self._library.decode([token]).encode()
        return self._library.decode(["a", token]).removeprefix("a").encode()


def _check_decoder(spec: dict[str, Any] | None) -> set[str]:
    """The kinds of a decoder's steps."""
    steps = flatten_steps(spec)
    fused = False  # Whether the library has made one string of all tokens.
    for step in steps:
        match step:
            case {"type": "ByteLevel"} if len(steps) == 1:
                pass
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": old}} if len(old) == 1 or not fused:
                pass
            case {"type": "Strip", "start": 0, "stop": 0}:
                pass
            case {"type": "Strip", "start": 1, "stop": 0} if fused:
                pass
            case {"type": "ByteFallback" | "Metaspace" | "WordPiece"} if not fused:
                pass
            case _:
                raise MaxlmError(
                    f"maxlm cannot decode token by token with the decoder {step['type']}",
                    where="tokenizer.json",
                    fix="use a model whose tokenizer has one of ByteLevel, Metaspace, WordPiece "
                    "or Replace + ByteFallback + Fuse",
                )
    return {step["type"] for step in steps}
