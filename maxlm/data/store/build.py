"""Building a token store: documents in, one finished folder out."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.data.corpus.config import SourceConfig
from maxlm.data.corpus.files import find_files
from maxlm.data.corpus.slices import Scan, scan_file
from maxlm.data.store.arrays import token_dtype
from maxlm.data.store.assemble import assemble
from maxlm.data.store.existing import check_replaceable
from maxlm.data.store.manifest import FORMAT_VERSION, Manifest, Source, Split, write_manifest
from maxlm.data.store.parts import Counts, Part, PartJob, PartSlice, finished_part, make_part
from maxlm.data.store.paths import locked_folder, writing
from maxlm.data.store.pool import WorkerPool, default_workers
from maxlm.data.store.progress import Progress, silent

_MAX_SHARD_BYTES = 64 << 20
_MIN_SHARD_BYTES = 256 << 10


def build_store(
    source: SourceConfig,
    tokenizer_folder: Path | str,
    out: Path | str,
    *,
    split: Split = "all",
    heldout_fraction: float = 0.0,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress = silent,
    force: bool = False,
) -> Manifest:
    """Tokenize a corpus into a token store in folder `out`.

    `out` appears only when it is complete. Until then finished parts lie beside it in
    `.NAME.building`; a build that was killed goes on from them, and its result is the same, bit
    for bit, as that of an unbroken one, whatever the number of workers. If `out` already holds
    the store of these inputs nothing is done but to hash the files. While it runs, the build
    needs the tokens' size on disk twice.

    Args:
        source: the files and how to read them.
        tokenizer_folder: a saved tokenizer; the store keeps a copy.
        split: which documents to take: those held out, the others, or all.
        heldout_fraction: the share held out, by `is_heldout`; not used for "all".
        workers: worker processes; by default the cores this process may use. 1 works in this
            process. With more, a script that calls this needs the usual
            `if __name__ == "__main__"` guard.
        shard_bytes: source bytes per part, the unit of work and of resumption; by default a
            64th of the corpus within 256 KiB to 64 MiB. Does not change the result.
        progress: told about the bytes read and the tokens written.
        force: replace a store of other inputs.

    Raises:
        MaxlmError: anything `read_documents` refuses; no documents; `out` holds a store of other
            inputs (names the difference) or something that is no store; a disk that is full or
            cannot be written; a build of the same store by another process.
    """
    from maxlm.data.tokenizer import load_tokenizer

    out, tokenizer_folder = Path(out), Path(tokenizer_folder)
    _check_settings(split, heldout_fraction, workers)
    tokenizer = load_tokenizer(tokenizer_folder)
    listing = find_files(source)
    if shard_bytes is None:
        even = sum(file.size for file in listing.files) // 64
        shard_bytes = min(max(even, _MIN_SHARD_BYTES), _MAX_SHARD_BYTES)
    with ThreadPoolExecutor(workers or default_workers()) as threads:
        scans = list(threads.map(lambda file: scan_file(file, shard_bytes), listing.files))
    planned = Manifest(
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
        num_binary_files=listing.num_binary,
        sources=tuple(
            Source(
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
    building = out.with_name(f".{out.name}.building")
    if existing := check_replaceable(out, planned, force):
        shutil.rmtree(building, ignore_errors=True)
        return existing
    with locked_folder(building), WorkerPool(workers or default_workers()) as pool:
        _forget_other_plan(building, planned, shard_bytes)
        with writing(building):
            (building / "parts").mkdir(exist_ok=True)
        units = list(_units(scans, shard_bytes))
        jobs = [
            PartJob(building / "parts", index, unit, source, tokenizer_folder, planned)
            for index, unit in enumerate(units)
        ]
        parts = _make_parts(jobs, pool, progress)
        manifest = _count(planned, parts)
        if not manifest.num_documents:
            shutil.rmtree(building)
            raise _no_documents(source, manifest, heldout_fraction)
        store = building / "store"
        with writing(building):
            shutil.rmtree(store, ignore_errors=True)
            store.mkdir()
        assemble(
            store,
            building / "parts",
            parts,
            manifest.dtype,
            pool,
            lambda done, total: progress("writing tokens", done, total),
        )
        with writing(building):
            tokenizer.save(store / "tokenizer")
            write_manifest(store, manifest)
            _publish(store, out, building / "replaced")
    shutil.rmtree(building, ignore_errors=True)
    return manifest


def _check_settings(split: Split, heldout_fraction: float, workers: int | None) -> None:
    if split != "all" and not 0 < heldout_fraction < 1:
        what = f"heldout_fraction={heldout_fraction} does not lie between 0 and 1"
        raise MaxlmError(what, fix=f'give a fraction such as 0.01, or split="all" (not "{split}")')
    if workers is not None and workers < 1:
        raise MaxlmError(f"workers={workers} is less than 1", fix="give 1 or more")


def _forget_other_plan(building: Path, planned: Manifest, shard_bytes: int) -> None:
    """Empty the folder if it was left by a build of anything else."""
    key = hashlib.sha256(f"{shard_bytes} {planned.model_dump_json()}".encode()).hexdigest()
    path = building / "plan"
    with writing(building):
        if path.exists() and path.read_text() == key:
            return
        shutil.rmtree(building / "parts", ignore_errors=True)
        temporary = building / "plan.new"
        temporary.write_text(key)
        os.replace(temporary, path)


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


def _make_parts(jobs: Sequence[PartJob], pool: WorkerPool, progress: Progress) -> list[Part]:
    itemsize = token_dtype(jobs[0].planned.vocab_size).itemsize
    sizes = [sum(each.slice.size for each in job.slices) for job in jobs]
    parts: dict[int, Part] = {}
    for job in jobs:
        if part := finished_part(job.folder, job.index, itemsize):
            parts[job.index] = part
    done, total = sum(sizes[index] for index in parts), sum(sizes)
    progress("tokenizing", done, total)
    for part in pool.map(make_part, [job for job in jobs if job.index not in parts]):
        parts[part.index] = part
        done += sizes[part.index]
        progress("tokenizing", done, total)
    return [parts[job.index] for job in jobs]


def _count(planned: Manifest, parts: Sequence[Part]) -> Manifest:
    """The manifest with the parts' counts filled in."""
    counts = [Counts()] * len(planned.sources)
    for part in parts:
        for source, each in part.counts.items():
            counts[source] += each
    total = sum(counts, Counts())
    sources = tuple(
        source.model_copy(update=vars(each))
        for source, each in zip(planned.sources, counts, strict=True)
    )
    return planned.model_copy(
        update={
            "num_tokens": sum(part.num_tokens for part in parts),
            "num_documents": total.num_documents,
            "text_bytes": total.text_bytes,
            "sources": sources,
        }
    )


def _no_documents(source: SourceConfig, manifest: Manifest, fraction: float) -> MaxlmError:
    where = ", ".join(source.documents)
    if manifest.split == "all":
        what = f"the corpus is empty: no text in {len(manifest.sources)} files"
        return MaxlmError(what, where=where, fix="name files that hold text")
    what = f'no document falls into the split "{manifest.split}" at heldout_fraction={fraction}'
    return MaxlmError(what, where=where, fix="use more documents or another fraction")


def _publish(store: Path, out: Path, replaced: Path) -> None:
    """Move the finished store to its place, by rename."""
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(out, replaced)
        try:
            os.rename(store, out)
        except OSError:
            with contextlib.suppress(OSError):
                os.rename(replaced, out)
            raise
    else:
        os.rename(store, out)
