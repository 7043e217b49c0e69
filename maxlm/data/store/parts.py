"""A corpus cut into parts that are tokenized apart: the unit of parallel work and of resumption.

A part is a run of whole documents. Its files hold raw tokens (`.tokens`) and the documents'
lengths in tokens (`.lengths`, int64); the counts (`.json`) are written last and make it finished.
"""

import fcntl
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.batching import batch_by_size
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.document import FileSlice, SkipReason, is_heldout
from maxlm.data.documents.files import describe_filter_rules, find_files
from maxlm.data.documents.reader import read_slice
from maxlm.data.documents.streams import FileScan, check_unchanged, scan_file
from maxlm.data.store.arrays import token_dtype
from maxlm.data.store.manifest import FORMAT_VERSION, Manifest, SourceEntry, Split
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.runtime.pool import count_usable_cores

if TYPE_CHECKING:
    from maxlm.data.tokenizer import Tokenizer

MAX_PART_BYTES = 64 << 20
MIN_PART_BYTES = 256 << 10
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class PartJob:
    """Everything that a worker needs to make one part."""

    folder: Path
    index: int
    slices: tuple[tuple[int, FileSlice], ...]
    """Slices, each after the index of its source file."""
    config: SourceConfig
    tokenizer_folder: Path
    planned: Manifest


@dataclass(frozen=True)
class FinishedPart:
    """A finished part."""

    index: int
    num_tokens: int
    num_documents: int
    counts: dict[int, Counter[str]]
    """Counts by source file, named as in a `SourceEntry`."""


@dataclass(frozen=True)
class BuildPlan:
    """The input of a store or a segment: its files, hashed but not yet read."""

    source: SourceConfig
    tokenizer_folder: Path
    tokenizer: "Tokenizer"
    manifest: Manifest
    """Manifest of the inputs, without counts."""
    scans: tuple[FileScan, ...]
    part_bytes: int

    def parts_folder(self, building: Path) -> Path:
        """Returns the folder that the parts are made in; parts of other inputs lie elsewhere."""
        text = f"{self.part_bytes} {self.manifest.model_dump_json()}"
        return building / f"parts-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def jobs(self, folder: Path) -> list[PartJob]:
        """Groups consecutive slices into parts of at least `part_bytes`."""
        units: list[list[tuple[int, FileSlice]]] = [[]]
        size = 0
        for index, scan in enumerate(self.scans):
            for each in scan.slices:
                if size >= self.part_bytes:
                    units.append([])
                    size = 0
                units[-1].append((index, each))
                size += each.size_bytes
        return [
            PartJob(folder, index, tuple(unit), self.source, self.tokenizer_folder, self.manifest)
            for index, unit in enumerate(units)
        ]


def plan_build(
    source: SourceConfig,
    tokenizer_folder: Path,
    split: Split,
    heldout_fraction: float,
    workers: int | None,
    part_bytes: int | None,
) -> BuildPlan:
    """Lists, hashes and cuts the files. Raises as `build_store`."""
    from maxlm.data.tokenizer import load_tokenizer

    if split != "all" and not 0 < heldout_fraction < 1:
        what = f"heldout_fraction={heldout_fraction} does not lie between 0 and 1"
        raise MaxlmError(what, fix=f'give a fraction such as 0.01, or split="all" (not "{split}")')
    if workers is not None and workers < 1:
        raise MaxlmError(f"workers={workers} is less than 1", fix="give 1 or more")
    tokenizer = load_tokenizer(tokenizer_folder)
    listing = find_files(source)
    if part_bytes is None:
        even = sum(file.size for file in listing.files) // 64
        part_bytes = min(max(even, MIN_PART_BYTES), MAX_PART_BYTES)
    with ThreadPoolExecutor(workers or count_usable_cores()) as threads:
        scans = tuple(threads.map(lambda file: scan_file(file, part_bytes), listing.files))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id if tokenizer.prefix_ids else None,
        eos_id=tokenizer.eos_id,
        dtype=token_dtype(tokenizer.vocab_size).name,  # pyright: ignore[reportArgumentType]
        split=split,
        heldout_fraction=heldout_fraction if split != "all" else 0.0,
        text_field=source.text_field,
        on_bad_bytes=source.on_bad_bytes,
        piece_bytes=source.piece_bytes,
        selection=describe_filter_rules(listing.files),
        num_binary_files=listing.num_binary_files,
        sources=tuple(
            SourceEntry(name=file.name, format=file.format, size=file.size, sha256=scan.sha256)
            for file, scan in zip(listing.files, scans, strict=True)
        ),
    )
    return BuildPlan(source, tokenizer_folder, tokenizer, manifest, scans, part_bytes)


def part_path(folder: Path, index: int, suffix: str) -> Path:
    return folder / f"{index:06d}.{suffix}"


def read_finished_part(folder: Path, index: int) -> FinishedPart | None:
    """Reads the part as an earlier run left it, or None if that run did not finish it."""
    try:
        record = json.loads(part_path(folder, index, "json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    counts = {int(source): Counter(each) for source, each in record.pop("counts").items()}
    return FinishedPart(counts=counts, **record)


def tokenize_part(job: PartJob) -> FinishedPart | None:
    """Read, split and tokenize a part's documents and write its files, unless another builder,
    maybe on another machine, is making it: then None.
    """
    claim = part_path(job.folder, job.index, "claim")
    with convert_write_errors(job.folder), open(claim, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return read_finished_part(job.folder, job.index) or _make_claimed_part(job)


def _make_claimed_part(job: PartJob) -> FinishedPart:
    tokenizer = _load(job.tokenizer_folder, job.planned.tokenizer_fingerprint)
    bos, eos, dtype = job.planned.bos_id, job.planned.eos_id, np.dtype(job.planned.dtype)
    counts: dict[int, Counter[str]] = {}
    num_tokens = num_documents = 0
    names = (part_path(job.folder, job.index, suffix) for suffix in ("tokens", "lengths"))
    with open(next(names), "wb") as tokens_file, open(next(names), "wb") as lengths_file:
        for texts in batch_by_size(_texts(job, counts), len, _BATCH_BYTES, _BATCH_DOCUMENTS):
            tokens, lengths = join_documents(tokenizer.encode_batch(texts), bos, eos, dtype)
            tokens_file.write(tokens.data)
            lengths_file.write(lengths.data)
            num_tokens += len(tokens)
            num_documents += len(lengths)
    part = FinishedPart(job.index, num_tokens, num_documents, counts)
    with replace_file(part_path(job.folder, job.index, "json")) as new:
        new.write_text(json.dumps(vars(part)))
    return part


def join_documents(
    encoded: Sequence[Sequence[int]], bos: int | None, eos: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Returns [bos] + ids + [eos] of every document end to end, and their lengths (int64).

    Without the first if ``bos`` is None.
    """
    first, last = () if bos is None else (bos,), (eos,)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded)) + len(first) + 1
    pieces = itertools.chain.from_iterable((first, ids, last) for ids in encoded)
    tokens = np.fromiter(itertools.chain.from_iterable(pieces), dtype, int(lengths.sum()))
    return tokens, lengths


def _texts(job: PartJob, counts: dict[int, Counter[str]]) -> Iterator[bytes]:
    """The texts of the job's split; adds up `counts` on the way."""
    split, fraction = job.planned.split, job.planned.heldout_fraction
    for source_index, part in job.slices:
        count = counts.setdefault(source_index, Counter())
        for document in read_slice(job.config, part):
            if document is SkipReason.RULE:
                count["num_dropped"] += 1
            elif isinstance(document, SkipReason):
                count["num_left_out"] += 1
            elif split == "all" or is_heldout(document.text, fraction) == (split == "heldout"):
                count["num_documents"] += 1
                count["text_bytes"] += len(document.text)
                yield document.text
        check_unchanged(part.file, "store")


@lru_cache(maxsize=1)
def _load(folder: Path, fingerprint: str) -> "Tokenizer":
    """The tokenizer, loaded once a process; the key's fingerprint keeps the cache honest."""
    from maxlm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        what = "the tokenizer changed while the store was being built"
        raise MaxlmError(what, where=str(folder), fix="run the build again")
    return tokenizer
