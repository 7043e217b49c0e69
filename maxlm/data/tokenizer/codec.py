"""The one implementation of Tokenizer: what both libraries share, over what each one differs in."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.config import Kind
from maxlm.data.tokenizer.segments import split_segments

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
    """What each id stands for, by id; for a special token its literal."""
    byte_ids: list[int]
    """The id of each single byte, by byte."""

    def encode_segments(self, segments: list[str]) -> list[list[int]]:
        """The ids of each segment of valid Unicode without reserved characters, in parallel."""
        ...

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


class CodecTokenizer:
    """A ``Tokenizer`` over a ``Codec``. Picklable; workers rebuild the library's model."""

    def __init__(self, kind: Kind, codec: Codec, special: SpecialTokens):
        self.kind: Kind = kind
        self.codec = codec
        self.special = special
        self._fingerprint = _fingerprint(kind, codec, special)

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
    def pad_id(self) -> int | None:
        return None if self.special.pad is None else self.special.ids[self.special.pad]

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self.special.ids)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return self.encode_batch([text])[0]
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        parts = self.special.split(raw)
        ordinary = self.encode_batch(parts[::2])
        ids = ordinary[0]
        for literal, following in zip(parts[1::2], ordinary[1:], strict=True):
            ids.append(self.special.ids[literal.decode()])
            ids += following
        return ids

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        results: list[list[int]] = [[] for _ in texts]
        pending: list[tuple[int, str | bytes]] = []
        size = 0
        for i, text in enumerate(texts):
            for segment in split_segments(text, reserved=self.codec.reserved, cut=self.codec.cut):
                pending.append((i, segment))
                size += len(segment)
                if size >= BATCH_CHARS:
                    self._encode_pending(pending, results)
                    pending, size = [], 0
        self._encode_pending(pending, results)
        return results

    def _encode_pending(
        self, pending: list[tuple[int, str | bytes]], results: list[list[int]]
    ) -> None:
        valid = [segment for _, segment in pending if isinstance(segment, str)]
        encoded = iter(self.codec.encode_segments(valid) if valid else ())
        for i, segment in pending:
            if isinstance(segment, bytes):
                ids = [self.codec.byte_ids[byte] for byte in segment]
            else:
                ids = next(encoded)
            if results[i]:
                results[i] += ids
            else:
                results[i] = ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = [int(i) for i in ids]
        # A negative index would silently count from the end.
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise MaxlmError(
                f"token id {wrong} is outside [0, {self.vocab_size})",
                fix="decode with the tokenizer that made the ids",
            )
        return b"".join(map(self.codec.token_bytes.__getitem__, ids))

    def save(self, folder: str | PathLike[str]) -> None:
        from maxlm.data.tokenizer.files import save_tokenizer

        save_tokenizer(self, Path(folder))


def _fingerprint(kind: Kind, codec: Codec, special: SpecialTokens) -> str:
    roles = [kind, special.bos, special.eos, special.pad, special.ids]
    digest = hashlib.sha256(json.dumps(roles, sort_keys=True).encode())
    digest.update(codec.content())
    return digest.hexdigest()
