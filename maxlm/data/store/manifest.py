"""The manifest of a token store."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from maxlm.config import Config, MaxlmError
from maxlm.config.errors import describe_first_error
from maxlm.data.documents.config import BadBytes
from maxlm.runtime.files import verify_and_strip_json_digest, write_json_with_digest
from maxlm.runtime.storage import Place, get_read_failure_fix, join_place, read_file

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

Split = Literal["train", "heldout", "all"]

# Inputs of a store besides its tokenizer and its files.
_COMPARED_SETTINGS = (
    "split",
    "heldout_fraction",
    "text_field",
    "on_bad_bytes",
    "piece_bytes",
)


class SourceEntry(Config):
    """One source file, and what the store took from it."""

    name: str
    """The path as it was given, or the path inside the standard library."""
    format: str
    size: int
    """Bytes on disk."""
    sha256: str
    """SHA-256 of the bytes on disk."""
    num_documents: int = 0
    """Documents in the store (so: in its split)."""
    text_bytes: int = 0
    """Bytes of those documents' text."""
    num_left_out: int = 0
    """Documents that were empty."""
    num_dropped: int = 0
    """Documents of a corpus that its rules dropped."""


class StoreSegment(Config):
    """The part of a store that one build or one append wrote."""

    num_tokens: int
    num_documents: int
    num_sources: int
    """Number of the manifest's sources that are its; they follow those of the segments
    before."""
    offsets_sha256: str
    """SHA-256 of its offsets, as little-endian int64."""
    tokens_sha256: str
    """SHA-256 of the SHA-256s, in hexadecimal, of each 16 Mi (a shard) of its tokens as
    little-endian numbers of their dtype."""
    checksums_sha256: str | None = None
    """SHA-256 of the list of the SHA-256s of its files; null: it was written without
    one."""
    selection: str | None = None
    """The rules by which its documents were taken from corpora."""


class Manifest(Config):
    """A token store's description; equal inputs give equal manifests, byte for byte."""

    format_version: int
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer's content."""
    vocab_size: int
    bos_id: int | None
    """Id that documents open with; null: none."""
    eos_id: int
    dtype: Literal["uint16", "uint32"]
    num_tokens: int = 0
    """All tokens, with the bos (if any) and the eos of each document."""
    num_documents: int = 0
    text_bytes: int = 0
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
    """Segments, in the order of their documents."""

    @property
    def offsets_sha256(self) -> str:
        """A hash of all offsets."""
        digests = [segment.offsets_sha256 for segment in self.segments]
        return digests[0] if len(digests) == 1 else hash_digests(digests)

    @property
    def tokens_sha256(self) -> str:
        """A hash of the tokens of all segments."""
        return hash_digests([segment.tokens_sha256 for segment in self.segments])

    def take_segments(self, num_segments: int) -> "Manifest":
        """Returns the manifest as of so many segments (but for `num_binary_files`)."""
        if not 1 <= num_segments <= len(self.segments):
            message = f"the store has {len(self.segments)} segments, not {num_segments}"
            fix = "ask for 1 to as many as there are"
            raise MaxlmError(message, where="segments", fix=fix)
        segments = self.segments[:num_segments]
        num_sources = sum(segment.num_sources for segment in segments)
        return self.with_segments(segments, self.sources[:num_sources])

    def with_segments(
        self, segments: tuple[StoreSegment, ...], sources: tuple[SourceEntry, ...]
    ) -> "Manifest":
        """Returns the manifest with these segments of these sources, and what they add
        up to."""
        selections = dict.fromkeys(
            segment.selection for segment in segments if segment.selection
        )
        return self.model_copy(
            update={
                "num_tokens": sum(segment.num_tokens for segment in segments),
                "num_documents": sum(segment.num_documents for segment in segments),
                "text_bytes": sum(source.text_bytes for source in sources),
                "selection": "\n".join(selections) or None,
                "sources": sources,
                "segments": segments,
            }
        )


def append_manifest(existing: Manifest, new: Manifest) -> Manifest:
    """Returns the manifest of a store with the segments of both, in this order."""
    segments = existing.segments + new.segments
    sources = existing.sources + new.sources
    num_binary_files = existing.num_binary_files + new.num_binary_files
    appended = existing.with_segments(segments, sources)
    return appended.model_copy(update={"num_binary_files": num_binary_files})


def hash_digests(digests: Sequence[str]) -> str:
    """Returns the SHA-256, in hex, of SHA-256s in hex one after the other."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def segment_path(segment_index: int) -> str:
    """Returns the folder in a store of segment `segment_index` (from 0); "" is the
    store's own."""
    return f"segments/{segment_index:06d}" if segment_index else ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a store folder, whole or not at all."""
    write_json_with_digest(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1))


def read_manifest(folder: Place) -> Manifest:
    """Reads the manifest of a store."""
    path = join_place(folder, MANIFEST_NAME)
    rebuild = "build the store again with maxlm corpus build"
    fix = get_read_failure_fix(folder, rebuild)
    try:
        text = read_file(folder, MANIFEST_NAME).decode()
    except (FileNotFoundError, NotADirectoryError) as error:
        message = "there is no token store here"
        raise MaxlmError(message, where=str(folder), fix=fix) from error
    except (OSError, UnicodeDecodeError) as error:
        raise MaxlmError(f"cannot read: {error}", where=str(path), fix=fix) from error
    try:
        manifest = Manifest.model_validate_json(verify_and_strip_json_digest(text))
    except ValueError as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            reason = describe_first_error(error)
        message = f"damaged manifest ({reason})"
        raise MaxlmError(message, where=str(path), fix=rebuild) from error
    if manifest.format_version != FORMAT_VERSION:
        message = (
            f"store format {manifest.format_version}; this maxlm reads {FORMAT_VERSION}"
        )
        raise MaxlmError(message, where=str(path), fix=rebuild)
    return manifest


def is_already_appended(
    error_location: str, existing: Manifest, planned: Manifest
) -> bool:
    """Whether a segment of the store holds just the files of the planned one."""
    difference = next(_describe_other_settings(existing, planned), None)
    if difference:
        fix = "give the store's settings, or build a store of its own and mix the two"
        raise MaxlmError(f"cannot append: {difference}", where=error_location, fix=fix)
    existing_files = [(source.sha256, source.format) for source in existing.sources]
    planned_files = [(source.sha256, source.format) for source in planned.sources]
    start = 0
    for segment in existing.segments:
        stop = start + segment.num_sources
        has_same_files = existing_files[start:stop] == planned_files
        if has_same_files and planned.selection in (None, segment.selection):
            return True
        start = stop
    # By name, too: other documents may well hold the same text, a licence for one.
    existing_names = {(source.name, source.sha256) for source in existing.sources}
    for source in planned.sources:
        if (source.name, source.sha256) in existing_names:
            message = f"{source.name} is already in the store"
            raise MaxlmError(message, where=error_location, fix="leave it out")
    return False


def describe_differences(existing: Manifest, planned: Manifest) -> Iterator[str]:
    """Describes each input in which two manifests differ.

    Counts follow from the inputs and file names do not matter, so neither is compared.
    """
    yield from _describe_other_settings(existing, planned)
    if existing.selection != planned.selection:
        yield "the rules by which the corpus's documents are taken have changed"
    for old, new in zip(existing.sources, planned.sources, strict=False):
        if (old.sha256, old.format) != (new.sha256, new.format):
            if old.name == new.name:
                yield f"{new.name} has changed"
            else:
                yield f"{old.name} where now {new.name} comes"
    old_count = len(existing.sources)
    new_count = len(planned.sources)
    if old_count != new_count:
        yield f"{old_count} files, now {new_count}"


def _describe_other_settings(existing: Manifest, planned: Manifest) -> Iterator[str]:
    old_fingerprint = existing.tokenizer_fingerprint
    new_fingerprint = planned.tokenizer_fingerprint
    if old_fingerprint != new_fingerprint:
        yield f"another tokenizer ({old_fingerprint[:12]}, now {new_fingerprint[:12]})"
    for name in _COMPARED_SETTINGS:
        old = getattr(existing, name)
        new = getattr(planned, name)
        if old != new:
            yield f"{name} was {old}, now {new}"
