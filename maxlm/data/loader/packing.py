"""Sequences of seq_len tokens out of a store's documents, as lists of pieces.

A piece is a run of tokens of one document. Either method puts every token of the store
into exactly one sequence:

  concat    the documents one after another, cut every seq_len tokens. Nothing is stored and
            nothing is padded but the very end; most documents lose context at a cut.
  best_fit  documents kept whole where they fit (Ding et al. 2024, "Fewer Truncations
  Improve
            Language Modeling"). A little padding, an index beside the store.

Best fit first cuts documents longer than seq_len into seq_len pieces and a remainder.
Within a block of documents, remainders and short documents go, longest first, each into
the fullest sequence that still has room (best-fit decreasing: Johnson 1973). The block
bounds the memory of the build and keeps each sequence's documents near one another in
the store. The index lies in STORE/packing/best_fit-<seq_len>-<block>-<hash>/ as
memory-mapped .npy files, beside a list of their checksums and an `index.json` that says
which index it is and holds the list's own.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from maxlm.config import Config, MaxlmError
from maxlm.data.store.arrays import Int64s, Offsets
from maxlm.runtime.checksums import CHECKSUMS_NAME, check_files, write_checksums
from maxlm.runtime.files import verify_and_strip_json_digest, write_json_with_digest

if TYPE_CHECKING:
    from maxlm.data.store import TokenStore

_MANIFEST = "index.json"
_MAKE_AGAIN = "delete this folder, which will be made again"
PIECE = np.dtype(
    [("start", np.int64), ("length", np.int32), ("ends_document", np.bool_)]
)
"""A piece: the index in the store of its first token, how many tokens it has (at least
1), and whether it reaches the end of its document."""
Pieces = NDArray[np.void]
"""Pieces one after another: of dtype `PIECE`."""


class TokenSource(Protocol):
    """The part of a token store that the loader reads; `maxlm.data.store.TokenStore`
    has it."""

    @property
    def path(self) -> Path | None:
        """The store's folder, where an index may be kept; None keeps it in memory."""
        ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def offsets(self) -> Any:
        """Indices of documents' first tokens, and num_tokens: int64 [num_documents +
        1], each above the last, an array or `Offsets`."""
        ...

    @property
    def offsets_sha256(self) -> Any:  # A str; Any also admits a cached_property.
        """A hash of the offsets, which names an index; not used where `path` is
        None."""
        ...

    def read_many(
        self, starts: Sequence[int], stops: Sequence[int]
    ) -> list[NDArray[np.integer]]:
        """Reads the tokens of every range [start, stop), concurrently."""
        ...


@dataclass(frozen=True)
class ConcatPacking:
    """Concatenate and cut: sequence i is tokens [i * seq_len, (i + 1) * seq_len) of the
    store."""

    store: TokenSource
    seq_len: int

    @property
    def num_sequences(self) -> int:
        return -(-self.store.num_tokens // self.seq_len)

    def find_pieces(self, sequences: Int64s) -> tuple[Int64s, Pieces]:
        """Returns the numbers of pieces [n] in the given sequences [n], each in
        range(num_sequences), and these pieces in order."""
        offsets = self.store.offsets
        begins = sequences * self.seq_len
        ends = np.minimum(begins + self.seq_len, self.store.num_tokens)
        # offsets[first:last] are the document starts strictly inside each sequence. As
        # many are below an end as are at most one less: one search for both.
        found = offsets.searchsorted(np.concatenate([begins, ends - 1]), side="right")
        first, last = np.split(found, 2)
        counts = last - first + 1
        row = np.repeat(np.arange(sequences.size), counts)
        nth = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.where(
            nth == 0, begins[row], offsets[np.maximum(first[row] + nth - 1, 0)]
        )
        is_last = nth == counts[row] - 1
        stops = np.where(is_last, ends[row], np.append(starts[1:], 0))
        return counts, _make_pieces(
            starts, stops - starts, ~is_last | (offsets[last] == ends)[row]
        )


def _make_pieces(
    starts: Int64s, lengths: Int64s, document_ends: NDArray[np.bool_]
) -> Pieces:
    pieces = np.empty(starts.size, PIECE)
    pieces["start"], pieces["length"], pieces["ends_document"] = (
        starts,
        lengths,
        document_ends,
    )
    return pieces


class PackingIndex(NamedTuple):
    """Pieces in sequence order; sequence i has pieces [sequence_offsets[i], [i +
    1])."""

    pieces: Pieces
    sequence_offsets: Int64s


class _IndexManifest(Config):
    """The content of an index's `index.json`."""

    seq_len: int
    packing_block: int
    offsets_sha256: str
    """Hash of the offsets that it was made of."""
    checksums_sha256: str
    """SHA-256 of the list of its files' checksums."""


@dataclass(frozen=True)
class BestFitPacking:
    """Looks sequences up in an index: in a folder (mapped on first use), or held in
    memory."""

    store: TokenSource
    source: Path | PackingIndex

    @cached_property
    def index(self) -> PackingIndex:
        if isinstance(self.source, PackingIndex):
            return self.source
        files = [self.source / f"{name}.npy" for name in PackingIndex._fields]
        try:
            return PackingIndex(
                *(np.asarray(np.load(file, mmap_mode="r")) for file in files)
            )
        except (OSError, ValueError) as error:
            what = f"damaged packing index: {error}"
            raise MaxlmError(what, where=str(self.source), fix=_MAKE_AGAIN) from error

    def __reduce__(self):  # A worker process maps the files itself.
        return BestFitPacking, (self.store, self.source)

    @property
    def num_sequences(self) -> int:
        return self.index.sequence_offsets.size - 1

    def find_pieces(self, sequences: Int64s) -> tuple[Int64s, Pieces]:
        """See `ConcatPacking.find_pieces`."""
        index = self.index
        first = index.sequence_offsets[sequences]
        counts = index.sequence_offsets[sequences + 1] - first
        at = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(
            counts.sum()
        )
        return counts, index.pieces[at]


Packing = ConcatPacking | BestFitPacking
"""A store's sequences, looked up by number."""


def open_best_fit(
    store: TokenSource, seq_len: int, block: int, *, verify: bool = False
) -> BestFitPacking:
    """Opens the store's best-fit packing, from the index beside it, which is built if
    missing.

    Safe when several processes or hosts build it at once: each builds its own copy
    (they are equal) and the first to finish wins. `verify`: reads the index and refuses
    it if a file is not as it was written; False checks the sizes of its files alone.
    """
    if store.path is None:
        return BestFitPacking(store, build_index(store.offsets, seq_len, block))
    name = _name_index(store.offsets_sha256, seq_len, block)
    folder = Path(store.path) / "packing" / name
    if not folder.is_dir():
        try:
            _write(folder, store, seq_len, block)
        except OSError as error:
            what = f"cannot write the packing index ({error.strerror})"
            fix = "make the store's folder writable once, or use packing=concat"
            raise MaxlmError(what, where=str(folder), fix=fix) from error
    elif verify:
        verify_index(folder)
    return BestFitPacking(store, folder)


def list_indices(store: TokenSource) -> list[Path]:
    """Lists the folders of all packing indices beside a store's arrays."""
    return (
        []
        if store.path is None
        else sorted(Path(store.path).glob("packing/best_fit-*"))
    )


def describe_missing_checksums(store: "TokenStore") -> list[str]:
    """Describes what of a store and its packing indices was written without checksums
    of whole files, a line each; no lines: nothing was."""
    lines = []
    numbers = store.segments_without_checksums
    if numbers:
        listed = ", ".join(map(str, numbers))
        lines.append(
            f"{store.place}: an earlier maxlm wrote segment {listed} without checksums "
            f"of files: "
            "tokens and offsets are compared with the manifest, other files are not "
            "checked"
        )
    for folder in list_indices(store):
        if not _has_checksums(folder):
            lines.append(
                f"{folder}: an earlier maxlm wrote this packing index without "
                f"checksums; "
                "delete the folder, and it is made again with them"
            )
    return lines


def _has_checksums(folder: Path) -> bool:
    return any((folder / name).exists() for name in (_MANIFEST, CHECKSUMS_NAME))


def verify_index(folder: Path) -> None:
    """Reads every file of an index, and raises MaxlmError if one is not as it was
    written or the index is another's. An index that was written without checksums
    passes."""
    if not _has_checksums(folder):
        return
    path = folder / _MANIFEST
    try:
        text = verify_and_strip_json_digest(path.read_text("utf-8"))
        manifest = _IndexManifest.model_validate_json(text)
    except (OSError, ValueError) as error:
        message = "damaged packing index: its manifest has changed since it was written"
        raise MaxlmError(message, where=str(path), fix=_MAKE_AGAIN) from error
    name = _name_index(
        manifest.offsets_sha256, manifest.seq_len, manifest.packing_block
    )
    if name != folder.name:
        message = f"this folder holds the packing index {name}"
        raise MaxlmError(message, where=str(folder), fix=_MAKE_AGAIN)
    check_files(
        folder,
        {"": manifest.checksums_sha256},
        "delete its folder, which will be made again",
    )


def _name_index(offsets_sha256: str, seq_len: int, block: int) -> str:
    """Names an index's folder. The offsets alone decide the index, so their hash in its
    name leaves nothing to go stale."""
    return f"best_fit-{seq_len}-{block}-{offsets_sha256[:12]}"


def build_index(offsets: Int64s | Offsets, seq_len: int, block: int) -> PackingIndex:
    """Builds the index in memory, from document offsets int64 [num_documents + 1]."""
    pieces, counts = map(
        np.concatenate, zip(*_blocks(offsets, seq_len, block), strict=True)
    )
    return PackingIndex(pieces, np.cumsum([0, *counts]))


def _blocks(
    offsets: Int64s | Offsets, seq_len: int, block: int
) -> Iterator[tuple[Pieces, Int64s]]:
    """Yields each block's pieces, in order of sequences, and how many each of its
    sequences has."""
    for first in range(0, offsets.size - 1, block):
        bounds = np.asarray(offsets[first : first + block + 1])
        counts = -(-np.diff(bounds) // seq_len)
        starts = np.repeat(bounds[:-1], counts)
        nth = np.arange(starts.size) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = starts + nth * seq_len
        stops = np.repeat(bounds[1:], counts)
        lengths = np.minimum(starts + seq_len, stops) - starts
        sequences = pack_best_fit(lengths, seq_len)
        pieces = _make_pieces(starts, lengths, starts + lengths == stops)
        yield pieces[np.argsort(sequences, kind="stable")], np.bincount(sequences)


def pack_best_fit(lengths: Int64s, capacity: int) -> Int64s:
    """Packs items [n] by best-fit decreasing: the bin of each, numbered from 0 without
    gaps.

    Bins with room r > 0 wait on the stack of r; bit r of one big integer says that the
    stack is not empty, so "the fullest bin that fits" is the lowest set bit from the
    item's length up.
    """
    bins = np.empty(lengths.size, np.int64)
    full = lengths == capacity
    num_bins = int(full.sum())
    bins[full] = np.arange(num_bins)
    items = np.flatnonzero(~full)
    items = items[np.argsort(-lengths[items], kind="stable")]
    waiting: dict[int, list[int]] = {}
    rooms = 0
    chosen = []
    for length in lengths[items].tolist():
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = waiting[room]
            target = stack.pop()
            if not stack:
                rooms ^= 1 << room
            room -= length
        else:
            target = num_bins
            room = capacity - length
            num_bins += 1
        chosen.append(target)
        if room:
            stack = waiting.setdefault(room, [])
            if not stack:
                rooms |= 1 << room
            stack.append(target)
    bins[items] = chosen
    return bins


def _write(folder: Path, store: TokenSource, seq_len: int, block: int) -> None:
    """Write the pieces block by block, so that memory grows with the number of
    sequences only."""
    offsets = store.offsets
    folder.parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    blocks = (offsets[i : i + block + 1] for i in range(0, offsets.size - 1, block))
    size = sum(int((-(-np.diff(bounds) // seq_len)).sum()) for bounds in blocks)
    try:
        counts = [np.zeros(1, np.int64)]
        with open(temporary / "pieces.npy", "wb") as file:
            header = {"descr": PIECE.descr, "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)
            for pieces, of_block in _blocks(offsets, seq_len, block):
                counts.append(of_block)
                file.write(pieces.data)
        np.save(temporary / "sequence_offsets.npy", np.cumsum(np.concatenate(counts)))
        manifest = _IndexManifest(
            seq_len=seq_len,
            packing_block=block,
            offsets_sha256=store.offsets_sha256,
            checksums_sha256=write_checksums(temporary),
        )
        write_json_with_digest(
            temporary / _MANIFEST, manifest.model_dump_json(indent=1)
        )
        temporary.chmod(0o755)  # mkdtemp's folders are for their maker alone.
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # Else another process was first.
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
