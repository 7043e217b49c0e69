"""Text <-> ids: the tokenizer, over the library that runs its model file.

The libraries take valid Unicode only, and SentencePiece confuses U+2581 with a space.
Those parts of a text become ``bytes`` segments, which turn into byte tokens one for one
without passing through the library; everything else stays a ``str`` segment. Long
segments are cut further where no token can cross the cut, so that one huge document
still uses every core and bounded memory.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Protocol

from maxlm.config import MaxlmError
from maxlm.data.batching import batch_by_size
from maxlm.data.tokenizer import files
from maxlm.data.tokenizer.config import Kind

# Characters handed to the library at once: bounds the memory of its own results, some
# 30 bytes a character until they are lists. Measured faster than whole batches: it is
# reused while in cache.
BATCH_CHARS = 1_048_576
SEGMENT_CHARS = 16_384


class Codec(Protocol):
    """One library's model, without the roles of special tokens."""

    data: bytes
    """The model file, byte for byte."""
    file_name: str
    """Name of the model's file in a tokenizer's folder."""
    reserved_chars: str
    """Characters that the library would not give back unchanged."""
    cut_pattern: re.Pattern[str]
    """Pattern of ends that no token crosses."""
    token_bytes: list[bytes]
    """Bytes of each id; a special token's literal; empty for an id without a token."""
    byte_ids: list[int] | None
    """The id of each single byte; None: bytes that are not UTF-8 become U+FFFD."""
    lossless: bool = True
    """Whether the bytes of a text's ids are the text."""
    ordinary_special_ids: frozenset[int] = frozenset()
    """Ids of special tokens that ordinary text may have: an unknown character's, those
    of bytes and of single characters."""
    unknown_ids: frozenset[int] = frozenset()
    """Ids that stand for everything outside the vocabulary."""
    encodes_special_tokens: bool = False
    """Whether the library itself looks for special tokens, and may swallow spaces
    beside them."""

    def encode_segments(self, segments: list[str]) -> list[list[int]]:
        """Encode segments of valid Unicode without reserved characters, in parallel."""
        ...

    def encode_segments_with_special(
        self, segments: list[str], escape_char: str | None = None
    ) -> list[list[int]]:
        """Encodes segments with special tokens' ids for their literals, where the
        library can; see ``Tokenizer.encode_with_escapes`` for ``escape_char``."""
        raise AssertionError("this library does not look for special tokens")

    def bytes_at_text_start(self, token_id: int) -> bytes:
        """Returns the bytes of this id at the beginning of a text."""
        return self.token_bytes[token_id]

    def fingerprint_input(self) -> bytes:
        """Everything that decides which ids a text gets, in a canonical form."""
        ...


@dataclass(frozen=True)
class SpecialTokens:
    """The literals with ids of their own, and which of them open, close and pad."""

    ids: dict[str, int]
    bos: str
    eos: str
    pad: str | None = None

    def split(self, text: bytes) -> list[bytes]:
        """Returns ordinary text at even places, literals of special tokens at odd
        ones."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        pattern = "|".join(re.escape(literal) for literal in longest_first)
        return re.split(f"({pattern})".encode(), text)


class Tokenizer:
    """Text <-> ids. Picklable; workers rebuild the library's model.

    For every text ``decode_bytes(encode(text))`` is the text if the tokenizer is
    ``lossless``: every one that maxlm trained but WordPiece is, an imported one if its
    own rules are (see ``HuggingFaceCodec``). No id in ``special_tokens`` is among
    ``encode(text)`` unless ``allow_special`` is set.

    Args:
        opens_with_bos: whether documents open with bos.
        extra_stop_ids: ids that end a continuation besides eos.
        extra_files: files by name that an imported tokenizer came with, kept for
            export.
    """

    def __init__(
        self,
        kind: Kind,
        codec: Codec,
        special: SpecialTokens,
        *,
        opens_with_bos: bool = True,
        extra_stop_ids: Iterable[int] = (),
        extra_files: Mapping[str, bytes] | None = None,
    ):
        self.kind: Kind = kind
        self.codec = codec
        self.special = special
        self.opens_with_bos = opens_with_bos
        self.extra_stop_ids = tuple(extra_stop_ids)
        self.extra_files = dict(extra_files or {})
        self.fingerprint = _hash_tokenizer(kind, codec, special, opens_with_bos)
        """sha256, in hex, of all that decides which ids a text gets; unchanged by save
        and load."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: ids lie in [0, vocab_size)."""
        return len(self.codec.token_bytes)

    @property
    def bos_id(self) -> int:
        """The id that opens a document; may equal ``eos_id``."""
        return self.special.ids[self.special.bos]

    @property
    def eos_id(self) -> int:
        """The id that closes a document."""
        return self.special.ids[self.special.eos]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a continuation: ``eos_id``, and those that a checkpoint
        names."""
        return tuple(dict.fromkeys((self.eos_id, *self.extra_stop_ids)))

    @property
    def pad_id(self) -> int | None:
        """The padding id, if the tokenizer has one."""
        return None if self.special.pad is None else self.special.ids[self.special.pad]

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids to put before a document or a prompt: ``(bos_id,)``, or none for an
        imported tokenizer that does not do so itself (GPT-2, Qwen, SmolLM2)."""
        return (self.bos_id,) if self.opens_with_bos else ()

    @property
    def lossless(self) -> bool:
        """Whether every text comes back. False: a normaliser may have changed it for
        good."""
        return self.codec.lossless

    @property
    def special_tokens(self) -> dict[str, int]:
        """Every special token's literal and id, in order of id, but for those that an
        imported tokenizer gives to ordinary text (``Codec.ordinary_special_ids``)."""
        ordinary_ids = self.codec.ordinary_special_ids
        return {
            literal: token_id
            for literal, token_id in self.special.ids.items()
            if token_id not in ordinary_ids
        }

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        """Encode one text. No bos or eos is added.

        Bytes need not be valid UTF-8, and a lone surrogate in a str stands for its
        three bytes. An imported tokenizer may have no ids for stray bytes: it reads
        U+FFFD instead.

        Args:
            allow_special: True turns each literal of a special token into its id: for
                templates and prompts that we wrote ourselves. False encodes those
                literals as the ordinary text they are: for anything a user or a corpus
                supplied.
        """
        if allow_special:
            return self.encode_with_escapes(text)
        return self.encode_batch([text])[0]

    def encode_with_escapes(
        self, text: str | bytes, escape_char: str | None = None
    ) -> list[int]:
        """Runs ``encode(text, allow_special=True)`` without the character
        ``escape_char``: literals that contain it stay ordinary text."""
        if self.codec.encodes_special_tokens:
            encode = partial(
                self.codec.encode_segments_with_special, escape_char=escape_char
            )
            return self._encode([text], encode)[0]
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        parts = self.special.split(raw)
        if escape_char is not None:
            # After the split: a literal with the character in it was not found.
            parts = [part.replace(escape_char.encode(), b"") for part in parts]
        ordinary_texts = parts[::2]
        literals = parts[1::2]
        ids, *ids_after_literals = self.encode_batch(ordinary_texts)
        for literal, ordinary_ids in zip(literals, ids_after_literals, strict=True):
            ids.append(self.special.ids[literal.decode()])
            ids += ordinary_ids
        return ids

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """Encodes each text, with all the library's threads."""
        return self._encode(texts, self.codec.encode_segments)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns ids' text; special tokens as literals, bytes that are not UTF-8 as
        U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, continued: bool = False) -> bytes:
        """Returns the exact bytes of ids; special tokens as their literals.
        ``continued``: the ids follow others. It matters to imported tokenizers that put
        a space before a text and take it away again: within a text a space is the
        text's own."""
        ids = [int(i) for i in ids]
        # A negative index would silently count from the end.
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong_id = next(i for i in ids if not 0 <= i < self.vocab_size)
            message = f"token id {wrong_id} is outside [0, {self.vocab_size})"
            fix = "decode with the tokenizer that made the ids"
            raise MaxlmError(message, fix=fix)
        pieces = [self.codec.token_bytes[i] for i in ids]
        if not continued:
            # The text begins with the first id that has a token.
            for place, piece in enumerate(pieces):
                if piece:
                    pieces[place] = self.codec.bytes_at_text_start(ids[place])
                    break
        return b"".join(pieces)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the tokenizer into ``folder``, made if need be; ``load_tokenizer``
        reads it back. A break on the way into an old folder leaves one that fails to
        load."""
        metadata = files.TokenizerMetadata(
            format=files.FORMAT,
            kind=self.kind,
            vocab_size=self.vocab_size,
            bos=self.special.bos,
            eos=self.special.eos,
            pad=self.special.pad,
            special_tokens=self.special.ids,
            fingerprint=self.fingerprint,
            opens=self.opens_with_bos,
            stops=self.extra_stop_ids,
            carried=tuple(self.extra_files),
        )
        metadata_json = metadata.model_dump_json(indent=2, exclude_defaults=True)
        contents = self.files_to_export()
        contents[files.METADATA] = f"{metadata_json}\n".encode()
        # Files of a tokenizer that was saved here before.
        names = {files.JSON_FILE, files.SENTENCEPIECE_FILE, *files.CARRIED}
        files.write_files(contents, Path(folder), stale=names - contents.keys())

    def files_to_export(self) -> dict[str, bytes]:
        """The files that other tools read: the model file and the carried ones."""
        return {self.codec.file_name: self.codec.data, **self.extra_files}

    def _encode(
        self,
        texts: Sequence[str | bytes],
        encode: Callable[[list[str]], list[list[int]]],
    ) -> list[list[int]]:
        ids_by_text: list[list[int]] = [[] for _ in texts]
        byte_ids = self.codec.byte_ids
        segments = self._split(texts)
        for batch in batch_by_size(segments, lambda item: len(item[1]), BATCH_CHARS):
            valid = [segment for _, segment in batch if isinstance(segment, str)]
            encoded = iter(encode(valid) if valid else ())
            for text_number, segment in batch:
                ids = ids_by_text[text_number]
                if isinstance(segment, str):
                    ids += next(encoded)
                elif byte_ids is not None:  # Else there are no stray bytes left.
                    ids += [byte_ids[byte] for byte in segment]
        return ids_by_text

    def _split(self, texts: Sequence[str | bytes]) -> Iterator[tuple[int, str | bytes]]:
        """Yields the segments of texts, each after its text's number."""
        for text_number, text in enumerate(texts):
            if self.codec.byte_ids is None:
                # Stray bytes have no ids: they become U+FFFD.
                escaped, _ = _to_str(text)
                raw = escaped.encode("utf-8", "surrogateescape")
                text = raw.decode("utf-8", "replace")
            segments = split_segments(
                text,
                reserved_chars=self.codec.reserved_chars,
                cut_pattern=self.codec.cut_pattern,
            )
            for segment in segments:
                yield text_number, segment


class StreamDecoder:
    """Turns ids into text as soon as whole characters are known.

    All that ``push`` and the final ``flush`` return, joined, is ``tokenizer.decode`` of
    all ids.

    Args:
        continued: the ids go on after others, such as a prompt's (see
            ``Tokenizer.decode_bytes``).
    """

    def __init__(self, tokenizer: Tokenizer, *, continued: bool = False):
        self._tokenizer = tokenizer
        self._continued = continued
        self._is_within_text = continued
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Returns the text that this id completes: empty inside a character of several
        tokens."""
        decode_bytes = self._tokenizer.decode_bytes
        data = decode_bytes([token_id], continued=self._is_within_text)
        if not self._is_within_text:
            # An id without a token says nothing: the text has not begun.
            self._is_within_text = decode_bytes([token_id], continued=True) != b""
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the text: returns U+FFFD if a character was left unfinished, else
        nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._is_within_text = self._continued
        return rest


def split_segments(
    text: str | bytes, *, reserved_chars: str, cut_pattern: re.Pattern[str]
) -> list[str | bytes]:
    """Split a text into segments whose UTF-8 bytes, joined, are the text's; see
    ``Codec``."""
    escaped, is_valid = _to_str(text)
    if is_valid and not any(char in escaped for char in reserved_chars):
        return list(cut_text(escaped, SEGMENT_CHARS, cut_pattern))
    segments: list[str | bytes] = []
    # The group makes every odd part one to be passed on as bytes.
    parts = re.split(f"([\ud800-\udfff{reserved_chars}]+)", escaped)
    for i, part in enumerate(parts):
        if i % 2:
            segments.append(part.encode("utf-8", "surrogateescape"))
        elif part:
            segments.extend(cut_text(part, SEGMENT_CHARS, cut_pattern))
    return segments


def cut_text(text: str, min_chars: int, cut_pattern: re.Pattern[str]) -> Iterator[str]:
    """Cut ``text`` at the first ``cut_pattern`` after every ``min_chars``
    characters."""
    start = 0
    while len(text) - start > min_chars:
        cut = cut_pattern.search(text, start + min_chars)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    if start < len(text):
        yield text[start:]


def _to_str(text: str | bytes) -> tuple[str, bool]:
    """The text with each stray byte as a surrogate in U+DC80..U+DCFF, and whether there
    is none."""
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


def _hash_tokenizer(
    kind: Kind, codec: Codec, special: SpecialTokens, opens: bool
) -> str:
    roles = [kind, special.bos, special.eos, special.pad, special.ids]
    if not opens:
        roles.append("no opening")
    digest = hashlib.sha256(json.dumps(roles, sort_keys=True).encode())
    content = codec.fingerprint_input()
    # Fingerprints of these kinds have always been over a hash.
    is_nested = kind in ("huggingface", "wordpiece")
    digest.update(hashlib.sha256(content).digest() if is_nested else content)
    return digest.hexdigest()
