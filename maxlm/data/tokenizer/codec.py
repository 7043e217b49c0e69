"""The one implementation of Tokenizer: what the libraries share, over what each one differs in."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.config import Kind
from maxlm.data.tokenizer.segments import split_segments, valid_text

# Characters handed to the library at once. Its own results take some 30 bytes a character until
# they are turned into lists: this bounds their memory for a batch of any size, and measured
# faster than whole batches, since it is reused while still in the cache.
BATCH_CHARS = 1_048_576


class Codec(Protocol):
    """One library's trained model, without notion of special tokens' roles."""

    data: bytes
    """The model file, byte for byte."""
    file_name: str
    """Its name in a tokenizer's folder."""
    reserved: str
    """Characters the library would not give back as they are."""
    cut: re.Pattern[str]
    """Ends where no token straddles."""
    token_bytes: list[bytes]
    """What each id stands for, by id; for a special token its literal; nothing for no token."""
    byte_ids: list[int] | None
    """The id of each single byte, by byte; None: bytes that are not UTF-8 become U+FFFD."""
    lossless: bool = True
    """Whether the bytes of a text's ids are the text."""
    ordinary: frozenset[int] = frozenset()
    """Ids of special tokens that text may have all the same: an unknown character's, those of bytes
    and of single characters."""
    unknown_ids: frozenset[int] = frozenset()
    """Ids that stand for whatever the vocabulary lacks."""
    finds_special: bool = False
    """Whether the library itself looks for special tokens, and may swallow spaces beside them."""

    def encode_segments(self, segments: list[str]) -> list[list[int]]:
        """The ids of each segment of valid Unicode without reserved characters, in parallel."""
        ...

    def encode_marked(self, segments: list[str]) -> list[list[int]]:
        """The same, with special tokens' ids for their literals, where ``finds_special``."""
        return self.encode_segments(segments)

    def encode_disarmed(self, segment: str, mark: str) -> list[int]:
        """``encode_marked``, where ``finds_special``, of a segment without the character ``mark``;
        literals that hold it are ordinary text."""
        return self.encode_segments([segment.replace(mark, "")])[0]

    def first_bytes(self, i: int) -> bytes:
        """What this id stands for at the beginning of a text."""
        return self.token_bytes[i]

    def content(self) -> bytes:
        """All that decides which ids a text gets, in a canonical form."""
        ...


@dataclass(frozen=True)
class SpecialTokens:
    """The literals with ids of their own, and which of them open, close and pad."""

    ids: dict[str, int]
    bos: str
    eos: str
    pad: str | None = None

    def split(self, text: bytes) -> list[bytes]:
        """Ordinary text at even places, literals of special tokens at odd ones."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        pattern = "|".join(re.escape(literal) for literal in longest_first)
        return re.split(f"({pattern})".encode(), text)


EncodeSegments = Callable[[list[str]], list[list[int]]]


class CodecTokenizer:
    """A ``Tokenizer`` over a ``Codec``. Picklable; workers rebuild the library's model.

    Args:
        opens: whether documents open with bos.
        stops: ids that end a continuation besides eos.
        carried: files by name that belong to a tokenizer that came from elsewhere, kept for its
            way back.
    """

    def __init__(
        self,
        kind: Kind,
        codec: Codec,
        special: SpecialTokens,
        *,
        opens: bool = True,
        stops: Iterable[int] = (),
        carried: Mapping[str, bytes] | None = None,
    ):
        self.kind: Kind = kind
        self.codec = codec
        self.special = special
        self.opens = opens
        self.stops = tuple(stops)
        self.carried = dict(carried or {})
        self._fingerprint = _fingerprint(kind, codec, special, opens)

    @property
    def vocab_size(self) -> int:
        return len(self.codec.token_bytes)

    @property
    def bos_id(self) -> int:
        return self.special.ids[self.special.bos]

    @property
    def eos_id(self) -> int:
        return self.special.ids[self.special.eos]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.eos_id, *self.stops)))

    @property
    def pad_id(self) -> int | None:
        return None if self.special.pad is None else self.special.ids[self.special.pad]

    @property
    def opening(self) -> tuple[int, ...]:
        return (self.bos_id,) if self.opens else ()

    @property
    def lossless(self) -> bool:
        return self.codec.lossless

    @property
    def special_tokens(self) -> dict[str, int]:
        ordinary = self.codec.ordinary
        return {literal: i for literal, i in self.special.ids.items() if i not in ordinary}

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return self.encode_batch([text])[0]
        if self.codec.finds_special:
            return self._encode([text], self.codec.encode_marked)[0]
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        parts = self.special.split(raw)
        ordinary = self.encode_batch(parts[::2])
        ids = ordinary[0]
        for literal, following in zip(parts[1::2], ordinary[1:], strict=True):
            ids.append(self.special.ids[literal.decode()])
            ids += following
        return ids

    def encode_disarmed(self, text: str, mark: str) -> list[int]:
        """``encode(text, allow_special=True)`` as if the character ``mark`` were not there, but of
        literals that hold it, which stay ordinary text."""
        if self.codec.finds_special:

            def encode(segments: list[str]) -> list[list[int]]:
                return [self.codec.encode_disarmed(segment, mark) for segment in segments]

            return self._encode([text], encode)[0]
        ids: list[int] = []
        for i, part in enumerate(self.special.split(text.encode("utf-8", "surrogatepass"))):
            if i % 2:
                ids.append(self.special.ids[part.decode()])
            else:
                ids += self.encode(part.replace(mark.encode(), b""))
        return ids

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        return self._encode(texts, self.codec.encode_segments)

    def _encode(self, texts: Sequence[str | bytes], encode: EncodeSegments) -> list[list[int]]:
        results: list[list[int]] = [[] for _ in texts]
        pending: list[tuple[int, str | bytes]] = []
        size = 0
        for i, text in enumerate(texts):
            if self.codec.byte_ids is None:
                text = valid_text(text)
            for segment in split_segments(text, reserved=self.codec.reserved, cut=self.codec.cut):
                pending.append((i, segment))
                size += len(segment)
                if size >= BATCH_CHARS:
                    self._encode_pending(pending, results, encode)
                    pending, size = [], 0
        self._encode_pending(pending, results, encode)
        return results

    def _encode_pending(
        self,
        pending: list[tuple[int, str | bytes]],
        results: list[list[int]],
        encode: EncodeSegments,
    ) -> None:
        valid = [segment for _, segment in pending if isinstance(segment, str)]
        encoded = iter(encode(valid) if valid else ())
        byte_ids = self.codec.byte_ids or ()  # Not looked at if there are none: see _encode.
        for i, segment in pending:
            if isinstance(segment, bytes):
                ids = [byte_ids[byte] for byte in segment]
            else:
                ids = next(encoded)
            if results[i]:
                results[i] += ids
            else:
                results[i] = ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, continued: bool = False) -> bytes:
        ids = [int(i) for i in ids]
        # A negative index would silently count from the end.
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise MaxlmError(
                f"token id {wrong} is outside [0, {self.vocab_size})",
                fix="decode with the tokenizer that made the ids",
            )
        pieces = [self.codec.token_bytes[i] for i in ids]
        first = None if continued else next((n for n, piece in enumerate(pieces) if piece), None)
        if first is not None:
            pieces[first] = self.codec.first_bytes(ids[first])
        return b"".join(pieces)

    def save(self, folder: str | PathLike[str]) -> None:
        from maxlm.data.tokenizer.files import save_tokenizer

        save_tokenizer(self, Path(folder))


def _fingerprint(kind: Kind, codec: Codec, special: SpecialTokens, opens: bool) -> str:
    roles = [kind, special.bos, special.eos, special.pad, special.ids]
    if not opens:
        roles.append("no opening")
    digest = hashlib.sha256(json.dumps(roles, sort_keys=True).encode())
    digest.update(codec.content())
    return digest.hexdigest()
