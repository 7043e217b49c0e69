"""The plan of a build: the files, hashed and cut into parts."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.files import find_files
from maxlm.data.documents.formats import describe_selected_documents
from maxlm.data.documents.slices import Scan, scan_file
from maxlm.data.store.arrays import token_dtype
from maxlm.data.store.manifest import FORMAT_VERSION, Manifest, SourceEntry, Split
from maxlm.data.store.parts import PartJob, PartSlice
from maxlm.runtime.pool import count_workers

if TYPE_CHECKING:
    from maxlm.data.tokenizer import Tokenizer

_MAX_SHARD_BYTES = 64 << 20
_MIN_SHARD_BYTES = 256 << 10


@dataclass(frozen=True)
class BuildPlan:
    """The input of a store or a segment: its files, hashed but not yet read."""

    source: SourceConfig
    tokenizer_folder: Path
    tokenizer: "Tokenizer"
    manifest: Manifest
    """Without counts."""
    scans: tuple[Scan, ...]
    shard_bytes: int

    @property
    def key(self) -> str:
        """A hash of the inputs: finished parts of another build are of no use."""
        text = f"{self.shard_bytes} {self.manifest.model_dump_json()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def jobs(self, folder: Path) -> list[PartJob]:
        units = _units(self.scans, self.shard_bytes)
        return [
            PartJob(folder, index, unit, self.source, self.tokenizer_folder, self.manifest)
            for index, unit in enumerate(units)
        ]


def plan_build(
    source: SourceConfig,
    tokenizer_folder: Path,
    split: Split,
    heldout_fraction: float,
    workers: int | None,
    shard_bytes: int | None,
) -> BuildPlan:
    """Lists, hashes and cuts the files. Raises as `build_store`."""
    from maxlm.data.tokenizer import load_tokenizer

    _check_settings(split, heldout_fraction, workers)
    tokenizer = load_tokenizer(tokenizer_folder)
    listing = find_files(source)
    if shard_bytes is None:
        even = sum(file.size for file in listing.files) // 64
        shard_bytes = min(max(even, _MIN_SHARD_BYTES), _MAX_SHARD_BYTES)
    with ThreadPoolExecutor(workers or count_workers()) as threads:
        scans = tuple(threads.map(lambda file: scan_file(file, shard_bytes), listing.files))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id if tokenizer.opening else None,
        eos_id=tokenizer.eos_id,
        dtype=token_dtype(tokenizer.vocab_size).name,  # pyright: ignore[reportArgumentType]
        num_tokens=0,
        num_documents=0,
        text_bytes=0,
        split=split,
        heldout_fraction=heldout_fraction if split != "all" else 0.0,
        text_field=source.text_field,
        on_bad_bytes=source.on_bad_bytes,
        piece_bytes=source.piece_bytes,
        selection=describe_selected_documents(listing.files),
        num_binary_files=listing.num_binary,
        sources=tuple(
            SourceEntry(
                name=file.name,
                format=file.format,
                size=file.size,
                sha256=scan.sha256,
                num_documents=0,
                text_bytes=0,
                num_left_out=0,
            )
            for file, scan in zip(listing.files, scans, strict=True)
        ),
    )
    return BuildPlan(source, tokenizer_folder, tokenizer, manifest, scans, shard_bytes)


def _check_settings(split: Split, heldout_fraction: float, workers: int | None) -> None:
    if split != "all" and not 0 < heldout_fraction < 1:
        what = f"heldout_fraction={heldout_fraction} does not lie between 0 and 1"
        raise MaxlmError(what, fix=f'give a fraction such as 0.01, or split="all" (not "{split}")')
    if workers is not None and workers < 1:
        raise MaxlmError(f"workers={workers} is less than 1", fix="give 1 or more")


def _units(scans: Sequence[Scan], shard_bytes: int) -> Iterator[tuple[PartSlice, ...]]:
    """Group consecutive slices into parts of at least `shard_bytes`."""
    unit: list[PartSlice] = []
    size = 0
    for index, scan in enumerate(scans):
        for each in scan.slices:
            unit.append(PartSlice(index, scan.mtime_ns, each))
            size += each.size
            if size >= shard_bytes:
                yield tuple(unit)
                unit, size = [], 0
    if unit:
        yield tuple(unit)
