"""Random access to a token store."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.store.arrays import (
    SHARD_TOKENS,
    Offsets,
    make_array_error,
    open_for_reading,
)
from maxlm.data.store.manifest import (
    Manifest,
    StoreSegment,
    hash_digests,
    read_manifest,
    segment_path,
)
from maxlm.runtime.checksums import check_files
from maxlm.runtime.storage import (
    Place,
    download_folder,
    get_read_failure_fix,
    join_place,
    to_place,
)

if TYPE_CHECKING:
    import tensorstore as ts
    from rich.table import Table

    from maxlm.data.tokenizer.codec import Tokenizer

# Offsets of so many documents (32 MiB) are held in memory; of more, chunks.
IN_MEMORY_DOCUMENTS = 4 << 20
# Decompressed data that is kept for later reads.
_TOKENS_CACHE_BYTES = 64 << 20
# For the indices of the shards of 10^9 documents (4 MiB), and for the chunks.
_OFFSETS_CACHE_BYTES = 8 << 20
_MANY_OFFSETS_CACHE_BYTES = 40 << 20
_VERIFY_TOKENS = 4 << 20
_VERIFY_DOCUMENTS = 1 << 20
_REBUILD = "build the store again with maxlm corpus build"
_RESTORE = "put the store back from a copy, or build it again with maxlm corpus build"


class TokenStore:
    """A finished token store, open for reading.

    Documents lie end to end in one array of tokens, each as [bos] + tokens + [eos];
    document i is `offsets[i]` to `offsets[i + 1]`. Pickling carries the path and the
    manifest; a worker process opens the arrays when it first reads.
    """

    def __init__(self, place: Place, manifest: Manifest):
        self.place = place
        self.manifest = manifest

    @classmethod
    def open(
        cls, path: Path | str, *, segments: int | None = None, verify: bool = False
    ) -> TokenStore:
        """Opens the store in folder `path`, or at a `gs://` or `s3://` URL.

        Args:
            segments: reads the store as it was when it had so many; None is all.
            verify: reads all of it first, and refuses it if anything is not as it was
                written (see `verify`). False checks the manifest and the sizes of the
                arrays alone; each chunk is checked against its own checksum when it is
                read, in either case.
        """
        place = to_place(path)
        manifest = read_manifest(place)
        if segments is not None:
            manifest = manifest.take_segments(segments)
        store = cls(place, manifest)
        if verify:
            store._verify_files()  # First: their errors name a file.
        store._check_shapes()
        if verify:
            store._verify_values()
        return store

    @property
    def path(self) -> Path | None:
        """The store's folder; None if it lies in an object store."""
        return self.place if isinstance(self.place, Path) else None

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.num_documents

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer that made the store; of an object store a copy, while this
        object lives."""
        return self.path / "tokenizer" if self.path else Path(self._tokenizer_copy.name)

    @cached_property
    def offsets(self) -> np.ndarray | Offsets:
        """Indices at which documents begin: int64 [num_documents + 1]; the last is
        `num_tokens`.

        Of more than 4 million documents an `Offsets`, which does not hold them all.
        """
        if self.num_documents > IN_MEMORY_DOCUMENTS:
            return Offsets(self._read_offsets, self.num_documents + 1)
        return self._wait(self._offsets.read(), "offsets")

    @property
    def offsets_sha256(self) -> str:
        """A hash of the offsets."""
        return self.manifest.offsets_sha256

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads tokens `start` to `stop`: uint16 or uint32 [stop - start]. Raises
        IndexError: the range does not lie within the store; MaxlmError: the data are
        missing or damaged."""
        return self.read_many([start], [stop])[0]

    def read_many(
        self, starts: Sequence[int], stops: Sequence[int]
    ) -> list[np.ndarray]:
        """Reads several ranges concurrently; see `read`."""
        ranges = [
            self._make_range(start, stop)
            for start, stop in zip(starts, stops, strict=True)
        ]
        # All reads are under way before the first is waited for.
        futures = [self._tokens[token_range].read() for token_range in ranges]
        arrays = []
        for future, token_range in zip(futures, ranges, strict=True):
            fault = f"cannot read tokens {token_range.start} to {token_range.stop}"
            arrays.append(self._wait(future, "tokens", fault))
        return arrays

    def document(self, index: int) -> np.ndarray:
        """Reads the tokens of one document, with its bos and eos."""
        if not 0 <= index < self.num_documents:
            message = (
                f"there is no document {index}; the store has {self.num_documents}"
            )
            fix = f"choose 0 to {self.num_documents - 1}"
            raise MaxlmError(message, where=str(self.place), fix=fix)
        start, stop = self._read_offsets(slice(index, index + 2))
        return self.read(int(start), int(stop))

    def text_tokens(self, index: int) -> np.ndarray:
        """Reads the tokens of one document's text, without its bos and eos."""
        return self.document(index)[self._num_opening_tokens : -1]

    @property
    def segments_without_checksums(self) -> list[int]:
        """Numbers, from 0, of the segments that were written without checksums of their
        files."""
        return [
            number
            for number, segment in enumerate(self.manifest.segments)
            if segment.checksums_sha256 is None
        ]

    def verify(self) -> None:
        """Reads every file and every value, and raises MaxlmError if one is not as it
        was written.

        Each file is compared with its SHA-256, tokens and offsets of each segment with
        theirs in the manifest; offsets must rise and tokens be ids of the vocabulary.
        The manifest itself was checked when the store was opened. Of a segment without
        checksums of its files (`segments_without_checksums`) all but the first is
        checked.
        """
        self._verify_files()
        self._verify_values()

    def _verify_files(self) -> None:
        list_sha256_by_folder = {
            segment_path(number): segment.checksums_sha256
            for number, segment in enumerate(self.manifest.segments)
            if segment.checksums_sha256 is not None
        }
        check_files(self.place, list_sha256_by_folder, _RESTORE)

    def _verify_values(self) -> None:
        first_document = 0
        first_token = 0
        for number, segment in enumerate(self.manifest.segments):
            self._verify_offsets(number, segment, first_document, first_token)
            self._verify_tokens(number, segment, first_token)
            first_document += segment.num_documents
            first_token += segment.num_tokens

    def _verify_offsets(
        self, number: int, segment: StoreSegment, first_document: int, first_token: int
    ) -> None:
        """Checks the offsets of a segment, whose documents and tokens begin at these
        numbers."""
        stop_document = first_document + segment.num_documents
        stop_token = first_token + segment.num_tokens
        min_document_tokens = self._num_opening_tokens + 1
        hasher = hashlib.sha256()
        last_offset = first_token
        for first in range(first_document, stop_document, _VERIFY_DOCUMENTS):
            stop = min(first + _VERIFY_DOCUMENTS, stop_document)
            offsets = self._read_offsets(slice(first, stop + 1))
            has_short_document = np.any(np.diff(offsets) < min_document_tokens)
            if offsets[0] != last_offset or has_short_document:
                raise self._make_damage_error(
                    "offsets do not rise from 0 by the tokens of a document"
                )
            # The last of these is the first of the next: hash it once.
            hashed = offsets if stop == stop_document else offsets[:-1]
            hasher.update(np.ascontiguousarray(hashed).data)
            last_offset = int(offsets[-1])
        if last_offset != stop_token:
            raise self._make_damage_error(
                f"offsets end at {last_offset}, not at {stop_token}"
            )
        if hasher.hexdigest() != segment.offsets_sha256:
            raise self._make_exchange_error("offsets", number)

    def _verify_tokens(
        self, number: int, segment: StoreSegment, first_token: int
    ) -> None:
        """Checks the tokens of a segment, which begin at this one of the store."""
        stop_token = first_token + segment.num_tokens
        digests: list[str] = []
        for shard_start in range(first_token, stop_token, SHARD_TOKENS):
            shard_stop = min(shard_start + SHARD_TOKENS, stop_token)
            hasher = hashlib.sha256()
            for start in range(shard_start, shard_stop, _VERIFY_TOKENS):
                tokens = self.read(start, min(start + _VERIFY_TOKENS, shard_stop))
                if tokens.max() >= self.manifest.vocab_size:
                    raise self._make_damage_error(
                        f"token {tokens.max()} lies outside the vocabulary"
                    )
                hasher.update(np.ascontiguousarray(tokens).data)
            digests.append(hasher.hexdigest())
        if hash_digests(digests) != segment.tokens_sha256:
            raise self._make_exchange_error("tokens", number)

    @property
    def _num_opening_tokens(self) -> int:
        """Tokens that each document opens with."""
        return 0 if self.manifest.bos_id is None else 1

    @property
    def _segment_folders(self) -> list[Place]:
        folders = [self.place]
        for number in range(1, len(self.manifest.segments)):
            folders.append(join_place(self.place, segment_path(number)))
        return folders

    @cached_property
    def _tokens(self) -> ts.TensorStore:
        return open_for_reading(self._segment_folders, "tokens", _TOKENS_CACHE_BYTES)

    @cached_property
    def _offsets(self) -> ts.TensorStore:
        is_large = self.num_documents > IN_MEMORY_DOCUMENTS
        cache_bytes = _MANY_OFFSETS_CACHE_BYTES if is_large else _OFFSETS_CACHE_BYTES
        return open_for_reading(self._segment_folders, "offsets", cache_bytes)

    @cached_property
    def _tokenizer_copy(self) -> tempfile.TemporaryDirectory[str]:
        copy = tempfile.TemporaryDirectory(prefix="tokenizer-")
        try:
            download_folder(self.place, "tokenizer", Path(copy.name))
        except OSError as error:
            message = f"cannot read the tokenizer: {error}"
            where = str(self.place)
            fix = get_read_failure_fix(self.place, _REBUILD)
            raise MaxlmError(message, where=where, fix=fix) from error
        return copy

    def _read_offsets(self, key: slice | np.ndarray) -> np.ndarray:
        return self._wait(self._offsets[key].read(), "offsets")

    def _check_shapes(self) -> None:
        num_offsets = self.num_documents + 1
        self._check_shape("tokens", self._tokens, self.num_tokens, self.manifest.dtype)
        self._check_shape("offsets", self._offsets, num_offsets, "int64")

    def _check_shape(
        self, name: str, array: ts.TensorStore, size: int, dtype: str
    ) -> None:
        shape = list(array.shape)
        if shape != [size] or array.dtype.name != dtype:
            raise self._make_damage_error(
                f"{name} are {array.dtype.name} {shape}, the manifest says {dtype} "
                f"[{size}]"
            )

    def _make_range(self, start: int, stop: int) -> slice:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(
                f"[{start}, {stop}) does not lie within {self.num_tokens} tokens"
            )
        return slice(int(start), int(stop))

    def _wait(
        self, future: ts.Future[np.ndarray], name: str, fault: str = "array error"
    ) -> np.ndarray:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            place = join_place(self.place, name)
            raise make_array_error(place, error, _REBUILD, fault) from error

    def _make_exchange_error(self, name: str, number: int) -> MaxlmError:
        """Makes the error for an array of a segment whose values are others than were
        written."""
        place = join_place(self._segment_folders[number], name)
        message = f"the {name} of segment {number} are not those that were written"
        return MaxlmError(message, where=str(place), fix=_RESTORE)

    def _make_damage_error(self, fault: str) -> MaxlmError:
        message = f"damaged store: {fault}"
        return MaxlmError(message, where=str(self.place), fix=_REBUILD)

    def __getstate__(self):
        return {"place": self.place, "manifest": self.manifest}


def check_tokenizer(store: TokenStore, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer other than the one that made the store."""
    store_fingerprint = store.manifest.tokenizer_fingerprint
    if store_fingerprint != tokenizer.fingerprint:
        message = (
            f"the store was made with another tokenizer ({store_fingerprint[:12]}, not "
            f"{tokenizer.fingerprint[:12]})"
        )
        fix = (
            f"use the tokenizer in {store.tokenizer_folder}, or build the store again "
            "with yours"
        )
        raise MaxlmError(message, where=str(store.place), fix=fix)


def describe_store(store: TokenStore) -> dict[str, Any]:
    """Returns the manifest as JSON values, with `path`, `bytes_on_disk` (0: not on a
    disk here) and `bytes_per_token`.

    Bytes per token counts bos and eos among the tokens.
    """
    files = store.path.rglob("*") if store.path else ()
    return {
        "path": str(store.place),
        "bytes_on_disk": sum(path.stat().st_size for path in files if path.is_file()),
        "bytes_per_token": store.manifest.text_bytes / store.num_tokens,
    } | store.manifest.model_dump(mode="json")


def summary_table(store: TokenStore) -> Table:
    """Formats the description as a two-column table, with the sources summed up."""
    from rich.table import Table

    about = describe_store(store)
    manifest = store.manifest
    left_out = sum(source.num_left_out for source in manifest.sources)
    dropped = sum(source.num_dropped for source in manifest.sources)
    split = manifest.split
    bos = "none" if manifest.bos_id is None else manifest.bos_id
    if split != "all":
        split = f"{split} ({manifest.heldout_fraction:g} of documents held out)"
    on_disk = f"{about['bytes_on_disk']:,} bytes" if store.path else "elsewhere"
    rows = {
        "tokens": f"{manifest.num_tokens:,} ({manifest.dtype})",
        "documents": f"{manifest.num_documents:,}",
        "segments": f"{len(manifest.segments):,}",
        "text": f"{manifest.text_bytes:,} bytes",
        "bytes per token": f"{about['bytes_per_token']:.3f}",
        "on disk": on_disk,
        "split": split,
        "source files": f"{len(manifest.sources):,}",
        "left out": f"{left_out:,} empty documents, {manifest.num_binary_files:,} "
        f"binary files, {dropped:,} documents that rules dropped",
        "vocabulary": f"{manifest.vocab_size:,} (bos {bos}, eos {manifest.eos_id})",
        "tokenizer": manifest.tokenizer_fingerprint[:16],
    }
    table = Table(title=str(store.place), show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
