"""Sequences of seq_len tokens out of a store's documents, as lists of pieces.

A piece is a run of tokens of one document. Either method puts every token of the store into
exactly one sequence:

  concat    the documents one after another, cut every seq_len tokens. Nothing is stored and
            nothing is padded but the very end; most documents lose context at a cut.
  best_fit  documents kept whole where they fit (Ding et al. 2024, "Fewer Truncations Improve
            Language Modeling"). A little padding, an index beside the store.

Best fit first cuts documents longer than seq_len into seq_len pieces and a remainder. Within a
block of documents, remainders and short documents go, longest first, each into the fullest sequence
that still has room (best-fit decreasing: Johnson 1973). The block bounds the memory of the build
and keeps each sequence's documents near one another in the store. The index lies in
STORE/packing/best_fit-<seq_len>-<block>-<hash>/ as memory-mapped .npy files.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.store.arrays import Int64s, Offsets

_ARRAYS = ("starts", "lengths", "ends", "sequence_offsets")


class TokenSource(Protocol):
    """The part of a token store that the loader reads; `maxlm.data.store.TokenStore` has it."""

    @property
    def path(self) -> Path | None:
        """The store's folder, where an index may be kept; None keeps it in memory."""
        ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def offsets(self) -> Any:
        """Indices of documents' first tokens, and num_tokens: int64 [num_documents + 1], an array
        or `Offsets`."""
        ...

    @property
    def offsets_sha256(self) -> Any:  # A str; Any also admits a cached_property.
        """A hash of the offsets, which names an index; not used where `path` is None."""
        ...

    def read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[NDArray[np.integer]]:
        """Reads the tokens of every range [start, stop), concurrently."""
        ...


class DocumentSpans(NamedTuple):
    """The pieces of some sequences, in order, one after another."""

    counts: Int64s
    """Pieces in each sequence [n]."""
    starts: Int64s
    """Index in the store of each piece's first token [sum(counts)]."""
    lengths: Int64s
    """Tokens of each piece, at least 1 [sum(counts)]."""
    ends_document: NDArray[np.bool_]
    """Whether the piece reaches the end of its document [sum(counts)]."""


@dataclass(frozen=True)
class ConcatPacking:
    """Concatenate and cut: sequence i is tokens [i * seq_len, (i + 1) * seq_len) of the store."""

    store: TokenSource
    seq_len: int

    @property
    def num_sequences(self) -> int:
        return -(-self.store.num_tokens // self.seq_len)

    def find_document_spans(self, sequences: Int64s) -> DocumentSpans:
        """Returns the pieces of the given sequences [n], each in range(num_sequences)."""
        offsets = self.store.offsets
        begins = sequences * self.seq_len
        ends = np.minimum(begins + self.seq_len, self.store.num_tokens)
        # offsets[first:last] are the document starts strictly inside each sequence. As many are
        # below an end as are at most one less: one search for both.
        found = offsets.searchsorted(np.concatenate([begins, ends - 1]), side="right")
        first, last = np.split(found, 2)
        counts = last - first + 1
        row = np.repeat(np.arange(sequences.size), counts)
        nth = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.where(nth == 0, begins[row], offsets[np.maximum(first[row] + nth - 1, 0)])
        is_last = nth == counts[row] - 1
        stops = np.where(is_last, ends[row], np.append(starts[1:], 0))
        document_ends = ~is_last | (offsets[last] == ends)[row]
        kept = stops > starts  # An empty document starts where the next one does.
        return DocumentSpans(
            np.bincount(row[kept], minlength=sequences.size),
            starts[kept],
            (stops - starts)[kept],
            document_ends[kept],
        )


@dataclass(frozen=True)
class PackingIndex:
    """Pieces in sequence order; sequence i has pieces [sequence_offsets[i], [i + 1])."""

    starts: Int64s
    lengths: NDArray[np.int32]
    ends: NDArray[np.bool_]
    sequence_offsets: Int64s


@dataclass(frozen=True)
class BestFitPacking:
    """Looks sequences up in an index: in a folder (mapped on first use), or held in memory."""

    store: TokenSource
    source: Path | PackingIndex

    @cached_property
    def index(self) -> PackingIndex:
        if isinstance(self.source, PackingIndex):
            return self.source
        files = {name: self.source / f"{name}.npy" for name in _ARRAYS}
        try:
            maps = {name: np.asarray(np.load(f, mmap_mode="r")) for name, f in files.items()}
        except (OSError, ValueError) as error:
            fix = "delete this folder, which will be made again"
            what = f"damaged packing index: {error}"
            raise MaxlmError(what, where=str(self.source), fix=fix) from error
        return PackingIndex(**maps)

    def __reduce__(self):  # A worker process maps the files itself.
        return BestFitPacking, (self.store, self.source)

    @property
    def num_sequences(self) -> int:
        return self.index.sequence_offsets.size - 1

    def find_document_spans(self, sequences: Int64s) -> DocumentSpans:
        """Returns the pieces of the given sequences [n], each in range(num_sequences)."""
        index = self.index
        first = index.sequence_offsets[sequences]
        counts = index.sequence_offsets[sequences + 1] - first
        at = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        lengths = index.lengths[at].astype(np.int64)
        return DocumentSpans(counts, index.starts[at], lengths, index.ends[at])


Packing = ConcatPacking | BestFitPacking
"""A store's sequences, looked up by number."""


def open_best_fit(store: TokenSource, seq_len: int, block: int) -> BestFitPacking:
    """Opens the store's best-fit packing, from the index beside it, which is built if missing.

    Safe when several processes or hosts build it at once: each builds its own copy (they are
    equal) and the first to finish wins.
    """
    if store.path is None:
        return BestFitPacking(store, build_index(store.offsets, seq_len, block))
    # The offsets alone decide the index, so their hash in its name leaves nothing to go stale.
    digest = store.offsets_sha256[:12]
    folder = Path(store.path) / "packing" / f"best_fit-{seq_len}-{block}-{digest}"
    if not folder.is_dir():
        try:
            _write(folder, store.offsets, seq_len, block)
        except OSError as error:
            what = f"cannot write the packing index ({error.strerror})"
            fix = "make the store's folder writable once, or use packing=concat"
            raise MaxlmError(what, where=str(folder), fix=fix) from error
    return BestFitPacking(store, folder)


def build_index(offsets: Int64s | Offsets, seq_len: int, block: int) -> PackingIndex:
    """Builds the index in memory, from document offsets int64 [num_documents + 1]."""
    blocks = zip(*_blocks(offsets, seq_len, block), strict=True)
    starts, lengths, ends, counts = map(np.concatenate, blocks)
    return PackingIndex(starts, lengths, ends, np.cumsum([0, *counts]))


def _blocks(
    offsets: Int64s | Offsets, seq_len: int, block: int
) -> Iterator[tuple[Int64s, NDArray[np.int32], NDArray[np.bool_], Int64s]]:
    """Yields each block's pieces (start, length, ends), in order of their sequences, and how many
    pieces each of its sequences has."""
    for first in range(0, offsets.size - 1, block):
        bounds = np.asarray(offsets[first : first + block + 1])
        counts = -(-np.diff(bounds) // seq_len)
        starts = np.repeat(bounds[:-1], counts)
        nth = np.arange(starts.size) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = starts + nth * seq_len
        stops = np.repeat(bounds[1:], counts)
        lengths = np.minimum(starts + seq_len, stops) - starts
        sequences = pack_best_fit(lengths, seq_len)
        order = np.argsort(sequences, kind="stable")
        ends = starts + lengths == stops
        yield (starts[order], lengths[order].astype(np.int32), ends[order], np.bincount(sequences))


def pack_best_fit(lengths: Int64s, capacity: int) -> Int64s:
    """Packs items [n] by best-fit decreasing: the bin of each, numbered from 0 without gaps.

    Bins with room r > 0 wait on the stack of r; bit r of one big integer says that the stack is
    not empty, so "the fullest bin that fits" is the lowest set bit from the item's length up.
    """
    bins = np.empty(lengths.size, np.int64)
    full = lengths == capacity
    num_bins = int(full.sum())
    bins[full] = np.arange(num_bins)
    items = np.flatnonzero(~full)
    items = items[np.argsort(-lengths[items], kind="stable")]
    waiting: dict[int, list[int]] = {}
    rooms, chosen = 0, []
    for length in lengths[items].tolist():
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = waiting[room]
            target = stack.pop()
            if not stack:
                rooms ^= 1 << room
            room -= length
        else:
            target, room = num_bins, capacity - length
            num_bins += 1
        chosen.append(target)
        if room:
            stack = waiting.setdefault(room, [])
            if not stack:
                rooms |= 1 << room
            stack.append(target)
    bins[items] = chosen
    return bins


def _write(folder: Path, offsets: Int64s | Offsets, seq_len: int, block: int) -> None:
    """Write the pieces block by block, so that memory grows with the number of sequences only."""
    folder.parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    blocks = (offsets[i : i + block + 1] for i in range(0, offsets.size - 1, block))
    size = sum(int((-(-np.diff(bounds) // seq_len)).sum()) for bounds in blocks)
    try:
        counts = [np.zeros(1, np.int64)]
        with ExitStack() as stack:
            files = [stack.enter_context(open(temporary / f"{n}.npy", "wb")) for n in _ARRAYS[:3]]
            for file, dtype in zip(files, (np.int64, np.int32, np.bool_), strict=True):
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (size,)}
                np.lib.format.write_array_header_1_0(file, header)
            for *pieces, of_block in _blocks(offsets, seq_len, block):
                counts.append(of_block)
                for file, array in zip(files, pieces, strict=True):
                    file.write(array.data)
        np.save(temporary / f"{_ARRAYS[3]}.npy", np.cumsum(np.concatenate(counts)))
        temporary.chmod(0o755)  # mkdtemp's folders are for their maker alone.
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # Else another process was first.
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
