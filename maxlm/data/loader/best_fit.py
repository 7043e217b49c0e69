"""Best-fit-decreasing packing within blocks of consecutive documents, indexed once on disk.

Documents longer than seq_len are first cut into seq_len pieces and a remainder. Within a block,
remainders and short documents go, longest first, each into the fullest sequence that still has
room (best-fit decreasing: Johnson 1973; for language models: Ding et al. 2024). The block bounds
the memory of the build and keeps each sequence's documents near one another in the store.

The index lies in STORE/packing/best_fit-<seq_len>-<block>-<hash>/ as memory-mapped .npy files; they
are checked against their checksums at the start of a run.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.loader.packing import DocumentSpans, Offsets, TokenSource
from maxlm.data.store.checksums import find_damaged_files, write_checksums

Int64s = NDArray[np.int64]
_ARRAYS = ("starts", "lengths", "ends", "sequence_offsets")
_REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class PackingIndex:
    """DocumentSpans in sequence order; sequence i has pieces [sequence_offsets[i], [i + 1])."""

    starts: Int64s
    lengths: NDArray[np.int32]
    ends: NDArray[np.bool_]
    sequence_offsets: Int64s


@dataclass(frozen=True)
class BestFitPacking:
    """Looks sequences up in an index: in a folder (mapped on first use), or held in memory."""

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

    def __reduce__(self):
        # A worker process maps the files itself; the mapped arrays must not travel.
        return BestFitPacking, (self.source,)

    @property
    def num_sequences(self) -> int:
        return self.index.sequence_offsets.size - 1

    def pieces(self, sequences: Int64s) -> DocumentSpans:
        index = self.index
        first = index.sequence_offsets[sequences]
        counts = index.sequence_offsets[sequences + 1] - first
        at = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        return DocumentSpans(
            counts, index.starts[at], index.lengths[at].astype(np.int64), index.ends[at]
        )


def open_best_fit(store: TokenSource, seq_len: int, block: int) -> BestFitPacking:
    """The store's best-fit packing, from the index beside it, which is built if missing.

    Safe when several processes or hosts build it at once: each builds its own copy (they are
    equal) and the first to finish wins.

    Raises:
        MaxlmError: the index cannot be written into the store's folder, or is damaged.
    """
    if store.path is None:
        return BestFitPacking(build_index(store.offsets, seq_len, block))
    # The offsets alone decide the index, so their hash in its name leaves nothing to go stale.
    digest = store.offsets_sha256[:12]
    folder = Path(store.path) / "packing" / f"best_fit-{seq_len}-{block}-{digest}"
    if not folder.is_dir():
        try:
            _write(folder, store.offsets, seq_len, block)
        except OSError as error:
            raise MaxlmError(
                f"cannot write the packing index ({error.strerror})",
                where=str(folder),
                fix="make the store's folder writable once, or use packing=concat",
            ) from error
    for name, fault in find_damaged_files(folder, None):
        fix = "delete its folder, which will be made again"
        raise MaxlmError(f"this file {fault}", where=str(folder / name), fix=fix)
    return BestFitPacking(folder)


def build_index(offsets: Offsets, seq_len: int, block: int) -> PackingIndex:
    """The index in memory, from document offsets int64 [num_documents + 1]."""
    size = _num_pieces(offsets, seq_len, block)
    arrays = (np.empty(size, np.int64), np.empty(size, np.int32), np.empty(size, np.bool_))
    firsts = np.empty(size + 1, np.int64)
    return PackingIndex(*arrays, firsts[: _fill(*arrays, firsts, offsets, seq_len, block)])


def _num_pieces(offsets: Offsets, seq_len: int, block: int) -> int:
    blocks = (offsets[i : i + block + 1] for i in range(0, offsets.size - 1, block))
    return sum(int((-(-np.diff(bounds) // seq_len)).sum()) for bounds in blocks)


def _fill(
    starts: Int64s,
    lengths: NDArray[np.int32],
    ends: NDArray[np.bool_],
    firsts: Int64s,
    offsets: Offsets,
    seq_len: int,
    block: int,
) -> int:
    """Fills the piece arrays and sequence_offsets in place; returns the size of the last."""
    done = opened = 0
    for piece_starts, piece_lengths, piece_ends, sequence in _blocks(offsets, seq_len, block):
        here = slice(done, done + piece_starts.size)
        starts[here], lengths[here], ends[here] = piece_starts, piece_lengths, piece_ends
        new = done + np.flatnonzero(np.diff(sequence, prepend=-1))
        firsts[opened : opened + new.size] = new
        done, opened = here.stop, opened + new.size
    firsts[opened] = done
    return opened + 1


def _blocks(
    offsets: Offsets, seq_len: int, block: int
) -> Iterator[tuple[Int64s, Int64s, NDArray[np.bool_], Int64s]]:
    """Each block's pieces (start, length, ends, sequence), in order of (sequence, start)."""
    num_documents = offsets.size - 1
    began = reported = time.monotonic()
    for first in range(0, num_documents, block):
        bounds = np.asarray(offsets[first : min(first + block, num_documents) + 1])
        sizes = np.diff(bounds)
        counts = -(-sizes // seq_len)
        starts = np.repeat(bounds[:-1], counts)
        nth = np.arange(starts.size) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = starts + nth * seq_len
        stops = np.repeat(bounds[1:], counts)
        lengths = np.minimum(starts + seq_len, stops) - starts
        sequence = pack_best_fit(lengths, seq_len)
        order = np.argsort(sequence, kind="stable")
        yield starts[order], lengths[order], (starts + lengths == stops)[order], sequence[order]
        if (now := time.monotonic()) - reported > _REPORT_SECONDS:
            reported, done = now, first + block
            rate = done / (now - began)
            logging.getLogger(__name__).info(
                "packing: %d of %d documents, %.0f documents/s, %.0f s left",
                *(done, num_documents, rate, (num_documents - done) / rate),
            )


def pack_best_fit(lengths: Int64s, capacity: int) -> Int64s:
    """The bin of each item [n] under best-fit decreasing, bins numbered from 0 without gaps.

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


def _map_file(path: Path, dtype: type, count: int) -> np.memmap:
    array = np.lib.format.open_memmap(path, "w+", dtype, (count,))
    if hasattr(os, "posix_fallocate"):  # Else a full disk ends the process by a signal.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _write(folder: Path, offsets: Offsets, seq_len: int, block: int) -> None:
    folder.parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        size = _num_pieces(offsets, seq_len, block)
        # Mapped, not held: pages go to the disk as they fill. The last is cut to size afterwards.
        starts, lengths, ends, firsts = (
            _map_file(temporary / f"{name}.npy", dtype, count)
            for name, dtype, count in (
                ("starts", np.int64, size),
                ("lengths", np.int32, size),
                ("ends", np.bool_, size),
                ("firsts", np.int64, size + 1),
            )
        )
        used = _fill(starts, lengths, ends, firsts, offsets, seq_len, block)
        np.save(temporary / "sequence_offsets.npy", np.asarray(firsts[:used]))
        (temporary / "firsts.npy").unlink()
        for array in (starts, lengths, ends):
            array.flush()
        write_checksums(temporary)
        temporary.chmod(0o755)  # mkdtemp's folders are for their maker alone.
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # Else another process was first.
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
