"""Sequences of seq_len tokens out of a store's documents, as lists of pieces.

A piece is a run of tokens of one document. Either method puts every token of the store
into exactly one sequence:

- concat: the documents one after another, cut every seq_len tokens. Nothing is stored
  and nothing is padded but the very end; most documents lose context at a cut.
- best_fit: documents kept whole where they fit (Ding et al. 2024, "Fewer Truncations
  Improve Language Modeling"). A little padding, an index beside the store.

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
    from maxlm.data.store.store import TokenStore

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
    """The part of a token store that the loader reads;
    `maxlm.data.store.store.TokenStore` has it."""

    @property
    def path(self) -> Path | None:
        """The store's folder, where an index may be kept; None keeps it in memory."""
        ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def offsets(self) -> Any:  # Int64s | Offsets; Any also admits a cached_property.
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
        # One element a sequence.
        sequence_starts = sequences * self.seq_len
        sequence_ends = np.minimum(
            sequence_starts + self.seq_len, self.store.num_tokens
        )
        # offsets[first:last] are the document starts strictly inside each sequence:
        # those above its start and below its end. What is below an end is at most one
        # less than it, so one search serves both.
        bounds = np.concatenate([sequence_starts, sequence_ends - 1])
        first, last = np.split(offsets.searchsorted(bounds, side="right"), 2)
        counts = last - first + 1
        ends_with_document = offsets[last] == sequence_ends

        # One element a piece: the first of a sequence starts with it, the others with a
        # document.
        sequence = np.repeat(np.arange(sequences.size), counts)
        index_in_sequence = _count_within(counts)
        document = np.maximum(first[sequence] + index_in_sequence - 1, 0)
        is_first = index_in_sequence == 0
        is_last = index_in_sequence == counts[sequence] - 1
        starts = np.where(is_first, sequence_starts[sequence], offsets[document])
        next_starts = np.append(starts[1:], 0)
        # Within a sequence each piece ends where the next one starts.
        stops = np.where(is_last, sequence_ends[sequence], next_starts)
        ends_document = ~is_last | ends_with_document[sequence]
        return counts, _make_pieces(starts, stops - starts, ends_document)


def _count_within(counts: Int64s) -> Int64s:
    """0, 1, ... count - 1 for each count: int64 [sum of counts]."""
    total_before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(total_before, counts)


def _make_pieces(
    starts: Int64s, lengths: Int64s, ends_document: NDArray[np.bool_]
) -> Pieces:
    pieces = np.empty(starts.size, PIECE)
    pieces["start"] = starts
    pieces["length"] = lengths
    pieces["ends_document"] = ends_document
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
        arrays = []
        try:
            for name in PackingIndex._fields:
                array = np.load(self.source / f"{name}.npy", mmap_mode="r")
                arrays.append(np.asarray(array))
        except (OSError, ValueError) as error:
            message = f"damaged packing index: {error}"
            raise MaxlmError(
                message, where=str(self.source), fix=_MAKE_AGAIN
            ) from error
        return PackingIndex(*arrays)

    def __reduce__(self):  # A worker process maps the files itself.
        return BestFitPacking, (self.store, self.source)

    @property
    def num_sequences(self) -> int:
        return self.index.sequence_offsets.size - 1

    def find_pieces(self, sequences: Int64s) -> tuple[Int64s, Pieces]:
        """See `ConcatPacking.find_pieces`."""
        index = self.index
        first_pieces = index.sequence_offsets[sequences]
        counts = index.sequence_offsets[sequences + 1] - first_pieces
        piece_numbers = np.repeat(first_pieces, counts) + _count_within(counts)
        return counts, index.pieces[piece_numbers]


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
            message = f"cannot write the packing index ({error.strerror})"
            fix = "make the store's folder writable once, or use packing=concat"
            raise MaxlmError(message, where=str(folder), fix=fix) from error
    elif verify:
        verify_index(folder)
    return BestFitPacking(store, folder)


def list_indices(store: TokenSource) -> list[Path]:
    """Lists the folders of all packing indices beside a store's arrays."""
    if store.path is None:
        return []
    return sorted(Path(store.path).glob("packing/best_fit-*"))


def describe_missing_checksums(store: "TokenStore") -> list[str]:
    """Describes what of a store and its packing indices was written without checksums
    of whole files, a line each; no lines: nothing was."""
    lines = []
    numbers = store.segments_without_checksums
    if numbers:
        listed = ", ".join(map(str, numbers))
        lines.append(
            f"{store.place}: an earlier maxlm wrote segment {listed} without checksums "
            "of files: tokens and offsets are compared with the manifest, other files "
            "are not checked"
        )
    for folder in list_indices(store):
        if not _has_checksums(folder):
            lines.append(
                f"{folder}: an earlier maxlm wrote this packing index without "
                "checksums; delete the folder, and it is made again with them"
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
    blocks = list(_pack_blocks(offsets, seq_len, block))
    pieces = np.concatenate([block_pieces for block_pieces, _ in blocks])
    counts = np.concatenate([block_counts for _, block_counts in blocks])
    return PackingIndex(pieces, sequence_offsets=np.cumsum([0, *counts]))


def _pack_blocks(
    offsets: Int64s | Offsets, seq_len: int, block: int
) -> Iterator[tuple[Pieces, Int64s]]:
    """Yields each block's pieces, in order of sequences, and how many each of its
    sequences has."""
    for first in range(0, offsets.size - 1, block):
        bounds = np.asarray(offsets[first : first + block + 1])
        counts = _count_pieces(bounds, seq_len)
        document_starts = np.repeat(bounds[:-1], counts)
        document_stops = np.repeat(bounds[1:], counts)
        starts = document_starts + _count_within(counts) * seq_len
        stops = np.minimum(starts + seq_len, document_stops)
        lengths = stops - starts
        sequences = pack_best_fit(lengths, seq_len)
        pieces = _make_pieces(starts, lengths, stops == document_stops)
        yield pieces[np.argsort(sequences, kind="stable")], np.bincount(sequences)


def _count_pieces(offsets: Int64s, seq_len: int) -> Int64s:
    """Pieces of at most seq_len tokens that each document is cut into."""
    return -(-np.diff(offsets) // seq_len)


def pack_best_fit(lengths: Int64s, capacity: int) -> Int64s:
    """Packs items [n] by best-fit decreasing: the bin of each, numbered from 0 without
    gaps.

    Bins with room r > 0 wait on the stack of r; bit r of one big integer, `rooms_bits`,
    says that the stack is not empty, so "the fullest bin that fits" is the lowest set bit
    from the item's length up.
    """
    bins = np.empty(lengths.size, np.int64)
    is_full = lengths == capacity
    num_bins = int(is_full.sum())
    bins[is_full] = np.arange(num_bins)
    items = np.flatnonzero(~is_full)
    longest_first = np.argsort(-lengths[items], kind="stable")
    items = items[longest_first]
    waiting_bins: dict[int, list[int]] = {}
    rooms_bits = 0
    chosen_bins = []
    for length in lengths[items].tolist():
        fitting_rooms_bits = rooms_bits >> length
        if fitting_rooms_bits:
            # x & -x keeps the lowest set bit of x.
            lowest_bit = fitting_rooms_bits & -fitting_rooms_bits
            bin_room = length + lowest_bit.bit_length() - 1
            stack = waiting_bins[bin_room]
            chosen = stack.pop()
            if not stack:
                rooms_bits ^= 1 << bin_room
        else:
            # Into a new bin.
            chosen = num_bins
            num_bins += 1
            bin_room = capacity
        room = bin_room - length
        chosen_bins.append(chosen)
        if room:
            stack = waiting_bins.setdefault(room, [])
            if not stack:
                rooms_bits |= 1 << room
            stack.append(chosen)
    bins[items] = chosen_bins
    return bins


def _write(folder: Path, store: TokenSource, seq_len: int, block: int) -> None:
    """Write the pieces block by block, so that memory grows with the number of
    sequences only."""
    offsets = store.offsets
    folder.parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    # The header of a .npy file, which comes first, says how many pieces follow.
    num_pieces = 0
    for first in range(0, offsets.size - 1, block):
        bounds = offsets[first : first + block + 1]
        num_pieces += int(_count_pieces(bounds, seq_len).sum())
    try:
        counts = [np.zeros(1, np.int64)]
        with open(temporary / "pieces.npy", "wb") as file:
            header = {
                "descr": PIECE.descr,
                "fortran_order": False,
                "shape": (num_pieces,),
            }
            np.lib.format.write_array_header_1_0(file, header)
            for pieces, block_counts in _pack_blocks(offsets, seq_len, block):
                counts.append(block_counts)
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
            if not folder.is_dir():
                raise
            # Else another process was first, and its copy is the same.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
