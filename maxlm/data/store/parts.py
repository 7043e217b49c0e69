"""A corpus cut into parts that are tokenized apart: the unit of parallel work and of
resumption.

A part is a run of whole documents. Its files hold raw tokens (`.tokens`) and the
documents' lengths in tokens (`.lengths`, int64); the counts (`.json`) are written last
and make it finished.
"""

import fcntl
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from maxlm.config import Config, MaxlmError
from maxlm.data.batching import batch_by_size
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.document import FileSlice, is_heldout
from maxlm.data.documents.files import describe_filter_rules, find_files
from maxlm.data.documents.reader import read_slice
from maxlm.data.documents.streams import FileScan, check_unchanged, scan_file
from maxlm.data.store.arrays import token_dtype
from maxlm.data.store.manifest import FORMAT_VERSION, Manifest, SourceEntry, Split
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.runtime.pool import count_usable_cores

if TYPE_CHECKING:
    from maxlm.data.tokenizer.codec import Tokenizer

# A part is a 64th of the source, within these limits.
_PARTS_PER_SOURCE = 64
MIN_PART_BYTES = 256 << 10
MAX_PART_BYTES = 64 << 20
# Texts that are encoded together.
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 4096


class PartJob(NamedTuple):
    """One part to be made."""

    index: int
    slices: tuple[tuple[int, FileSlice], ...]
    """Slices, each after the index of its source file."""


class FinishedPart(Config):
    """A finished part."""

    index: int
    num_tokens: int
    counts: dict[int, Counter[str]]
    """Counts by source file, named as in a `SourceEntry`."""


@dataclass(frozen=True)
class BuildPlan:
    """The input of a store or a segment: its files, hashed but not yet read."""

    source: SourceConfig
    tokenizer: "Tokenizer"
    manifest: Manifest
    """Manifest of the inputs, without counts."""
    jobs: list[PartJob]
    parts_name: str
    """Name of the folder that the parts are made in; parts of other inputs lie
    elsewhere."""


def plan_build(
    source: SourceConfig,
    tokenizer_folder: Path,
    split: Split,
    heldout_fraction: float,
    workers: int | None,
) -> BuildPlan:
    """Lists, hashes and cuts the files. Raises as `build_store`."""
    from maxlm.data.tokenizer.load import load_tokenizer

    if split != "all" and not 0 < heldout_fraction < 1:
        message = f"heldout_fraction={heldout_fraction} does not lie between 0 and 1"
        fix = f'give a fraction such as 0.01, or split="all" (not "{split}")'
        raise MaxlmError(message, fix=fix)
    tokenizer = load_tokenizer(tokenizer_folder)
    listing = find_files(source)
    total_bytes = sum(file.size for file in listing.files)
    part_bytes = total_bytes // _PARTS_PER_SOURCE
    part_bytes = min(max(part_bytes, MIN_PART_BYTES), MAX_PART_BYTES)
    with ThreadPoolExecutor(workers or count_usable_cores()) as threads:
        scan_slices = partial(scan_file, slice_bytes=part_bytes)
        scans = tuple(threads.map(scan_slices, listing.files))
    sources = tuple(
        SourceEntry(
            name=file.name, format=file.format, size=file.size, sha256=scan.sha256
        )
        for file, scan in zip(listing.files, scans, strict=True)
    )
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
        sources=sources,
    )
    # Parts of other inputs, or cut otherwise, must not be taken for these.
    inputs = f"{part_bytes} {manifest.model_dump_json()}"
    digest = hashlib.sha256(inputs.encode()).hexdigest()
    return BuildPlan(
        source=source,
        tokenizer=tokenizer,
        manifest=manifest,
        jobs=_list_jobs(scans, part_bytes),
        parts_name=f"parts-{digest[:16]}",
    )


def _list_jobs(scans: Sequence[FileScan], part_bytes: int) -> list[PartJob]:
    """A job for each run of slices, of one file or several, that make up a part."""
    slices = [
        (source_index, file_slice)
        for source_index, scan in enumerate(scans)
        for file_slice in scan.slices
    ]
    parts = batch_by_size(slices, lambda item: item[1].size_bytes, part_bytes)
    return [PartJob(index, tuple(part)) for index, part in enumerate(parts)]


def part_path(folder: Path, index: int, suffix: str) -> Path:
    return folder / f"{index:06d}.{suffix}"


def read_finished_part(folder: Path, index: int) -> FinishedPart | None:
    """Reads the part as an earlier run left it, or None if that run did not finish
    it."""
    path = part_path(folder, index, "json")
    try:
        return FinishedPart.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValueError):  # a machine that went down left it empty
        return None


def tokenize_part(
    folder: Path,
    source: SourceConfig,
    tokenizer: "Tokenizer",
    planned: Manifest,
    job: PartJob,
) -> FinishedPart | None:
    """Read, split and tokenize a part's documents and write its files into `folder`,
    unless another builder, maybe on another machine, is making it: then None."""
    claim_path = part_path(folder, job.index, "claim")
    with convert_write_errors(folder), open(claim_path, "w") as claim:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        # Another builder may have finished it since this one looked.
        finished = read_finished_part(folder, job.index)
        if finished:
            return finished
        counts: dict[int, Counter[str]] = {}
        texts = _read_texts(source, planned, job, counts)
        num_tokens = _write_tokens(folder, job.index, tokenizer, planned, texts)
        part = FinishedPart(index=job.index, num_tokens=num_tokens, counts=counts)
        with replace_file(part_path(folder, job.index, "json")) as new:
            new.write_text(part.model_dump_json())
        return part


def _write_tokens(
    folder: Path,
    index: int,
    tokenizer: "Tokenizer",
    planned: Manifest,
    texts: Iterable[bytes],
) -> int:
    """Writes the tokens and lengths of a part's documents. Returns how many tokens."""
    opening = () if planned.bos_id is None else (planned.bos_id,)
    closing = (planned.eos_id,)
    num_tokens = 0
    with (
        open(part_path(folder, index, "tokens"), "wb") as tokens_file,
        open(part_path(folder, index, "lengths"), "wb") as lengths_file,
    ):
        for batch in batch_by_size(texts, len, _BATCH_BYTES, _BATCH_DOCUMENTS):
            encoded = tokenizer.encode_batch(batch)
            lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
            lengths += len(opening) + len(closing)
            pieces = chain.from_iterable((opening, ids, closing) for ids in encoded)
            ids_in_order = chain.from_iterable(pieces)
            total = int(lengths.sum())
            tokens = np.fromiter(ids_in_order, np.dtype(planned.dtype), total)
            tokens_file.write(tokens.data)
            lengths_file.write(lengths.data)
            num_tokens += len(tokens)
    return num_tokens


def _read_texts(
    source: SourceConfig,
    planned: Manifest,
    job: PartJob,
    counts_by_source: dict[int, Counter[str]],
) -> Iterator[bytes]:
    """The texts of the store's split; adds up `counts_by_source` on the way."""
    for source_index, file_slice in job.slices:
        counts = counts_by_source.setdefault(source_index, Counter())
        for document in read_slice(source, file_slice):
            if document is None:
                counts["num_dropped"] += 1
            elif not document.text:
                counts["num_left_out"] += 1
            elif _is_in_split(document.text, planned):
                counts["num_documents"] += 1
                counts["text_bytes"] += len(document.text)
                yield document.text
        check_unchanged(file_slice.file, "store")


def _is_in_split(text: bytes, planned: Manifest) -> bool:
    if planned.split == "all":
        return True
    wants_heldout = planned.split == "heldout"
    return is_heldout(text, planned.heldout_fraction) == wants_heldout
