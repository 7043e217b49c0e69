"""Tokenizing a corpus part by part: the unit of parallel work and of resumption.

A part is a run of whole documents. Its files hold raw tokens (`.tokens`) and the documents'
lengths in tokens (`.lengths`, int64); the counts (`.json`) are written last and make it finished.
"""

import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.document import FileSlice, LeftOut
from maxlm.data.documents.heldout import is_heldout
from maxlm.data.documents.reader import read_slice
from maxlm.data.documents.slices import check_unchanged
from maxlm.data.store.manifest import Manifest, Split
from maxlm.runtime.files import convert_write_errors

if TYPE_CHECKING:
    from maxlm.data.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class PartSlice:
    """A slice to tokenize, of the source file with this index, last modified at this time."""

    source: int
    mtime_ns: int
    slice: FileSlice


@dataclass(frozen=True)
class PartJob:
    """All that a worker needs to make one part."""

    folder: Path
    index: int
    slices: tuple[PartSlice, ...]
    config: SourceConfig
    tokenizer_folder: Path
    planned: Manifest


@dataclass(frozen=True)
class SourceCounts:
    """Documents and bytes of one source file in a part."""

    num_documents: int = 0
    text_bytes: int = 0
    num_left_out: int = 0
    num_dropped: int = 0

    def __add__(self, other: "SourceCounts") -> "SourceCounts":
        return SourceCounts(
            self.num_documents + other.num_documents,
            self.text_bytes + other.text_bytes,
            self.num_left_out + other.num_left_out,
            self.num_dropped + other.num_dropped,
        )


@dataclass(frozen=True)
class FinishedPart:
    """A finished part."""

    index: int
    num_tokens: int
    num_documents: int
    counts: dict[int, SourceCounts]
    """By source file."""


def part_path(folder: Path, index: int, suffix: str) -> Path:
    return folder / f"{index:06d}.{suffix}"


def read_finished_part(folder: Path, index: int, itemsize: int) -> FinishedPart | None:
    """The part as an earlier run left it, or None if that run did not finish it."""
    try:
        record = json.loads(part_path(folder, index, "json").read_text())
        counts = {
            int(source): SourceCounts(**each) for source, each in record.pop("counts").items()
        }
        part = FinishedPart(counts=counts, **record)
        whole = (
            part_path(folder, index, "tokens").stat().st_size == part.num_tokens * itemsize
            and part_path(folder, index, "lengths").stat().st_size == part.num_documents * 8
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return part if whole else None


def make_unclaimed_part(job: PartJob) -> FinishedPart | None:
    """Make a part unless another process, maybe on another machine, is making it: then None."""
    with (
        convert_write_errors(job.folder),
        open(part_path(job.folder, job.index, "claim"), "w") as claim,
    ):
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        itemsize = np.dtype(job.planned.dtype).itemsize
        return read_finished_part(job.folder, job.index, itemsize) or make_part(job)


def make_part(job: PartJob) -> FinishedPart:
    """Read, split and tokenize a part's documents and write its files.

    Raises:
        MaxlmError: a document cannot be read (see `read_documents`), a source file changed since
            it was hashed, or the part cannot be written.
    """
    tokenizer = _load(job.tokenizer_folder, job.planned.tokenizer_fingerprint)
    bos, eos, dtype = job.planned.bos_id, job.planned.eos_id, np.dtype(job.planned.dtype)
    counts: dict[int, SourceCounts] = {}
    num_tokens = num_documents = 0
    temporary = {s: part_path(job.folder, job.index, f"{s}.{os.getpid()}") for s in _SUFFIXES}
    try:
        with (
            convert_write_errors(job.folder),
            open(temporary["tokens"], "wb") as tokens_file,
            open(temporary["lengths"], "wb") as lengths_file,
        ):
            for texts in _batches(_texts(job, counts)):
                tokens, lengths = join_documents(tokenizer.encode_batch(texts), bos, eos, dtype)
                tokens_file.write(tokens.data)
                lengths_file.write(lengths.data)
                num_tokens += len(tokens)
                num_documents += len(lengths)
        part = FinishedPart(job.index, num_tokens, num_documents, counts)
        with convert_write_errors(job.folder):
            temporary["json"].write_text(json.dumps(asdict(part)))
            for suffix in _SUFFIXES:  # json last: it declares the part finished
                os.replace(temporary[suffix], part_path(job.folder, job.index, suffix))
        return part
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


_SUFFIXES = ("tokens", "lengths", "json")


def join_documents(
    encoded: Sequence[Sequence[int]], bos: int | None, eos: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """[bos] + ids + [eos] of every document end to end, and their lengths (int64).

    Without the first if ``bos`` is None.
    """
    first, last = () if bos is None else (bos,), (eos,)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + len(first) + 1
    pieces = itertools.chain.from_iterable((first, ids, last) for ids in encoded)
    tokens = np.fromiter(itertools.chain.from_iterable(pieces), dtype, int(lengths.sum()))
    return tokens, lengths


def _texts(job: PartJob, counts: dict[int, SourceCounts]) -> Iterator[bytes]:
    """The texts of the job's split; adds up `counts` on the way."""
    split, fraction = job.planned.split, job.planned.heldout_fraction
    for each in job.slices:
        documents = text_bytes = left_out = dropped = 0
        for document in read_slice(job.config, each.slice):
            if document is LeftOut.RULE:
                dropped += 1
            elif isinstance(document, LeftOut):
                left_out += 1
            elif _in_split(document.text, split, fraction):
                documents += 1
                text_bytes += len(document.text)
                yield document.text
        check_unchanged(each.slice.file, each.mtime_ns, "store")
        new = SourceCounts(documents, text_bytes, left_out, dropped)
        counts[each.source] = counts.get(each.source, SourceCounts()) + new


def _in_split(text: bytes, split: Split, fraction: float) -> bool:
    return split == "all" or is_heldout(text, fraction) == (split == "heldout")


def _batches(texts: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _load(folder: Path, fingerprint: str) -> "Tokenizer":
    """The tokenizer, loaded once a process; the key's fingerprint keeps the cache honest."""
    from maxlm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        what = "the tokenizer changed while the store was being built"
        raise MaxlmError(what, where=str(folder), fix="run the build again")
    return tokenizer
