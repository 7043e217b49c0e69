"""The manifest of a token store."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from maxlm.config import Config, MaxlmError
from maxlm.data.documents.config import BadBytes
from maxlm.runtime.files import strip_digest, write_json
from maxlm.runtime.storage import Place, join_place, read_failure_hint, read_file

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

Split = Literal["train", "heldout", "all"]


class SourceEntry(Config):
    """One source file, and what the store took from it."""

    name: str
    """The path as it was given, or the path inside the standard library."""
    format: str
    size: int
    """Bytes on disk."""
    sha256: str
    """Of the bytes on disk."""
    num_documents: int
    """Documents in the store (so: in its split)."""
    text_bytes: int
    """Bytes of those documents' text."""
    num_left_out: int
    """Documents that were empty, or left out by `on_bad_bytes="skip"`."""
    num_dropped: int = 0
    """Documents of a corpus that its rules dropped (an older version counts them above)."""


class StoreSegment(Config):
    """The part of a store that one build or one append wrote."""

    num_tokens: int
    num_documents: int
    num_sources: int
    """How many of the manifest's sources are its; they follow those of the segments before."""
    offsets_sha256: str
    """Of its offsets, as little-endian int64."""
    tokens_sha256: str | None = None
    """Of the SHA-256s, in hexadecimal, of each 16 Mi (a shard) of its tokens as little-endian
    numbers of their dtype; null: an older version wrote it."""
    checksums_sha256: str | None = None
    """Of its list of checksums; null: an older version wrote it."""
    selection: str | None = None
    """The rules by which its documents were taken from corpora."""


class Manifest(Config):
    """A token store's description; equal inputs give equal manifests, byte for byte."""

    format_version: int
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer's content."""
    vocab_size: int
    bos_id: int | None
    """What documents open with; null: nothing."""
    eos_id: int
    dtype: Literal["uint16", "uint32"]
    num_tokens: int
    """All tokens, with the bos (if any) and the eos of each document."""
    num_documents: int
    text_bytes: int
    """Bytes of text behind the tokens: what bits per byte divides by."""
    split: Split
    heldout_fraction: float
    """Share of documents held out; 0 for the split "all"."""
    text_field: str
    on_bad_bytes: BadBytes
    piece_bytes: int | None = None
    selection: str | None = None
    """The rules by which documents were taken from the corpora among the sources."""
    num_binary_files: int
    """Files passed over as binary."""
    sources: tuple[SourceEntry, ...]
    segments: tuple[StoreSegment, ...] = ()
    """In the order of their documents. None: a store of an older version, which has one."""

    @property
    def offsets_sha256(self) -> str | None:
        """A hash of all offsets; None for a store of an older version."""
        digests = [segment.offsets_sha256 for segment in self.segments]
        if len(digests) < 2:
            return digests[0] if digests else None
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def tokens_sha256(self) -> str | None:
        """A hash of the tokens of all segments; None if an older version wrote one of them."""
        digests = [segment.tokens_sha256 or "" for segment in self.segments]
        if not all(digests) or not digests:
            return None
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def first(self, segments: int) -> "Manifest":
        """As it was when it had only so many segments (but for `num_binary_files`).

        Raises:
            MaxlmError: it has fewer, or none is asked for.
        """
        if not 1 <= segments <= max(1, len(self.segments)):
            what = f"the store has {max(1, len(self.segments))} segments, not {segments}"
            raise MaxlmError(what, where="segments", fix="ask for 1 to as many as there are")
        kept = self.segments[:segments]
        if len(kept) == len(self.segments):
            return self
        sources = self.sources[: sum(segment.num_sources for segment in kept)]
        known = any(segment.selection for segment in self.segments)
        return self.model_copy(
            update={
                "num_tokens": sum(segment.num_tokens for segment in kept),
                "num_documents": sum(segment.num_documents for segment in kept),
                "text_bytes": sum(source.text_bytes for source in sources),
                "selection": _together(s.selection for s in kept) if known else self.selection,
                "sources": sources,
                "segments": kept,
            }
        )


def append_manifest(existing: Manifest, new: Manifest) -> Manifest:
    """Returns the manifest of a store with the segments of both, in this order."""
    selection = _together((existing.selection, new.selection))
    sums = ("num_tokens", "num_documents", "text_bytes", "num_binary_files", "sources", "segments")
    return existing.model_copy(
        update={name: getattr(existing, name) + getattr(new, name) for name in sums}
        | {"selection": selection}
    )


def _together(selections: Iterable[str | None]) -> str | None:
    return "\n".join(dict.fromkeys(filter(None, selections))) or None


def segment_path(number: int) -> str:
    """Where in a store's folder segment `number` (from 0) has its arrays; "" is the folder."""
    return f"segments/{number:06d}" if number else ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a store folder, whole or not at all."""
    write_json(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1))


def read_manifest(folder: Place) -> Manifest:
    """The manifest of a store.

    Raises:
        MaxlmError: no store there, or a manifest that is damaged or of another format version.
    """
    path = join_place(folder, MANIFEST_NAME)
    rebuild = "build the store again with maxlm corpus build"
    fix = read_failure_hint(folder, rebuild)
    try:
        text = read_file(folder, MANIFEST_NAME).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MaxlmError("there is no token store here", where=str(folder), fix=fix) from error
    except (OSError, UnicodeDecodeError) as error:
        raise MaxlmError(f"cannot read: {error}", where=str(path), fix=fix) from error
    try:
        manifest = Manifest.model_validate_json(strip_digest(text))
    except ValueError as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        what = f"damaged manifest ({reason})"
        raise MaxlmError(what, where=str(path), fix=rebuild) from error
    if manifest.format_version != FORMAT_VERSION:
        what = f"store format {manifest.format_version}; this maxlm reads {FORMAT_VERSION}"
        raise MaxlmError(what, where=str(path), fix=rebuild)
    return manifest
