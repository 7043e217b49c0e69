"""A corpus cut into parts that are tokenized apart: the unit of parallel work and of
resumption.

A part is a run of whole documents. Its files hold raw tokens (`.tokens`) and the
documents' lengths in tokens (`.lengths`, int64); the counts (`.json`) are written last
and make it finished.
"""

import fcntl
import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from maxlm.data.documents.streams import check_unchanged, scan_file
from maxlm.data.store.arrays import token_dtype
from maxlm.data.store.manifest import FORMAT_VERSION, Manifest, SourceEntry, Split
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.runtime.pool import count_usable_cores

if TYPE_CHECKING:
    from maxlm.data.tokenizer import Tokenizer

# Of a source, what a part has: a 64th within these.
MIN_PART_BYTES, MAX_PART_BYTES = 256 << 10, 64 << 20
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
    from maxlm.data.tokenizer import load_tokenizer

    if split != "all" and not 0 < heldout_fraction < 1:
        what = f"heldout_fraction={heldout_fraction} does not lie between 0 and 1"
        raise MaxlmError(
            what, fix=f'give a fraction such as 0.01, or split="all" (not "{split}")'
        )
    tokenizer = load_tokenizer(tokenizer_folder)
    listing = find_files(source)
    even = sum(file.size for file in listing.files) // 64
    part_bytes = min(max(even, MIN_PART_BYTES), MAX_PART_BYTES)
    with ThreadPoolExecutor(workers or count_usable_cores()) as threads:
        scans = tuple(
            threads.map(lambda file: scan_file(file, part_bytes), listing.files)
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
        sources=tuple(
            SourceEntry(
                name=file.name, format=file.format, size=file.size, sha256=scan.sha256
            )
            for file, scan in zip(listing.files, scans, strict=True)
        ),
    )
    slices = ((index, each) for index, scan in enumerate(scans) for each in scan.slices)
    units = batch_by_size(slices, lambda item: item[1].size_bytes, part_bytes)
    jobs = [PartJob(index, tuple(unit)) for index, unit in enumerate(units)]
    digest = hashlib.sha256(
        f"{part_bytes} {manifest.model_dump_json()}".encode()
    ).hexdigest()
    return BuildPlan(source, tokenizer, manifest, jobs, f"parts-{digest[:16]}")


def part_path(folder: Path, index: int, suffix: str) -> Path:
    return folder / f"{index:06d}.{suffix}"


def read_finished_part(folder: Path, index: int) -> FinishedPart | None:
    """Reads the part as an earlier run left it, or None if that run did not finish
    it."""
    try:
        return FinishedPart.model_validate_json(
            part_path(folder, index, "json").read_bytes()
        )
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
    with (
        convert_write_errors(folder),
        open(part_path(folder, job.index, "claim"), "w") as file,
    ):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if finished := read_finished_part(folder, job.index):
            return finished
        bos = () if planned.bos_id is None else (planned.bos_id,)
        eos = (planned.eos_id,)
        dtype = np.dtype(planned.dtype)
        counts: dict[int, Counter[str]] = {}
        num_tokens = 0
        documents = _texts(source, planned, job, counts)
        names = (
            part_path(folder, job.index, suffix) for suffix in ("tokens", "lengths")
        )
        with (
            open(next(names), "wb") as tokens_file,
            open(next(names), "wb") as lengths_file,
        ):
            for texts in batch_by_size(documents, len, _BATCH_BYTES, _BATCH_DOCUMENTS):
                encoded = tokenizer.encode_batch(texts)
                lengths = (
                    np.fromiter(map(len, encoded), np.int64, len(encoded))
                    + len(bos)
                    + 1
                )
                pieces = chain.from_iterable((bos, ids, eos) for ids in encoded)
                tokens = np.fromiter(
                    chain.from_iterable(pieces), dtype, int(lengths.sum())
                )
                tokens_file.write(tokens.data)
                lengths_file.write(lengths.data)
                num_tokens += len(tokens)
        part = FinishedPart(index=job.index, num_tokens=num_tokens, counts=counts)
        with replace_file(part_path(folder, job.index, "json")) as new:
            new.write_text(part.model_dump_json())
        return part


def _texts(
    source: SourceConfig,
    planned: Manifest,
    job: PartJob,
    counts: dict[int, Counter[str]],
) -> Iterator[bytes]:
    """The texts of the store's split; adds up `counts` on the way."""
    split, fraction = planned.split, planned.heldout_fraction
    for source_index, part in job.slices:
        count = counts.setdefault(source_index, Counter())
        for document in read_slice(source, part):
            if document is None:
                count["num_dropped"] += 1
            elif not document.text:
                count["num_left_out"] += 1
            elif split == "all" or is_heldout(document.text, fraction) == (
                split == "heldout"
            ):
                count["num_documents"] += 1
                count["text_bytes"] += len(document.text)
                yield document.text
        check_unchanged(part.file, "store")
