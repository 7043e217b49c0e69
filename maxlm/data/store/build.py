"""Building a token store: documents in, one finished folder out."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from maxlm.config import MaxlmError, check_local_path
from maxlm.data.documents.config import SourceConfig
from maxlm.data.store.arrays import token_dtype
from maxlm.data.store.assemble import assemble
from maxlm.data.store.checksums import write_checksums
from maxlm.data.store.existing import check_replaceable, is_appended
from maxlm.data.store.manifest import (
    Manifest,
    Split,
    StoreSegment,
    append_manifest,
    segment_path,
    write_manifest,
)
from maxlm.data.store.parts import (
    FinishedPart,
    PartJob,
    SourceCounts,
    make_part,
    make_unclaimed_part,
    read_finished_part,
)
from maxlm.data.store.plan import BuildPlan, plan_build
from maxlm.data.store.store import TokenStore
from maxlm.runtime.files import convert_write_errors, lock_folder, replace_file
from maxlm.runtime.pool import WorkerPool, count_workers
from maxlm.runtime.progress import Progress, ignore_progress


def build_store(
    source: SourceConfig,
    tokenizer_folder: Path | str,
    out: Path | str,
    *,
    split: Split = "all",
    heldout_fraction: float = 0.0,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress = ignore_progress,
    force: bool = False,
    join: bool = False,
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
        join: work beside other builders of this store, on this machine or on others that share
            the disk, each called the same way. Parts go to whoever is free; the last to be done
            writes the store while the others wait, and all return. Its files are the same as one
            builder's. The disk must support `flock` (NFS from version 4 does).

    Raises:
        MaxlmError: anything `read_documents` refuses; no documents; `out` holds a store of other
            inputs (names the difference) or something that is no store; a disk that is full or
            cannot be written; a build of the same store by another process, without `join`; with
            it, one of other inputs.
    """
    out, tokenizer_folder = Path(check_local_path(out)), Path(tokenizer_folder)
    plan = plan_build(source, tokenizer_folder, split, heldout_fraction, workers, shard_bytes)
    building = out.with_name(f".{out.name}.building")
    _finish_swap(out, building, wait=join)
    if existing := check_replaceable(out, plan.manifest, force):
        _clear(building)
        return existing
    with WorkerPool(workers or count_workers()) as pool:
        if join:
            _share_parts(plan, building, out, force, pool, progress)
        with lock_folder(building, wait=join):
            # Meanwhile another builder may have finished it, or another store.
            if existing := check_replaceable(out, plan.manifest, force):
                shutil.rmtree(building, ignore_errors=True)
                return existing
            manifest = _write_segment(plan, building, 0, pool, progress)
            with convert_write_errors(building):
                plan.tokenizer.save(building / "store" / "tokenizer")
                manifest = _with_checksums(manifest, write_checksums(building / "store"))
                write_manifest(building / "store", manifest)
                _publish(building / "store", out, building / "replaced")
            shutil.rmtree(building, ignore_errors=True)
    return manifest


def append_store(
    source: SourceConfig,
    out: Path | str,
    *,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress = ignore_progress,
) -> Manifest:
    """Add the documents of more files to the store in folder `out`, as a new segment.

    They come after those that are there, which keep their numbers and are not touched; tokenizer,
    split and fraction are the store's. The segment counts from when the manifest is replaced, at
    the end: readers that opened the store before go on with what it was. A killed append goes on
    when it is called again; one that is done is not done twice.

    Args: see `build_store`.

    Raises:
        MaxlmError: as `build_store`; other ways of reading than the store's; a file that is
            already in it under its name, or no file whose content is not.
    """
    out = Path(check_local_path(out))
    _finish_swap(out, out.with_name(f".{out.name}.building"))
    existing = TokenStore.open(out).manifest
    split = existing.split, existing.heldout_fraction
    plan = plan_build(source, out / "tokenizer", *split, workers, shard_bytes)
    building = out.with_name(f".{out.name}.building")
    with WorkerPool(workers or count_workers()) as pool, lock_folder(building):
        existing = _with_segments(TokenStore.open(out))
        if not is_appended(out, existing, plan.manifest):
            new = _write_segment(plan, building, existing.num_tokens, pool, progress)
            folder = out / segment_path(len(existing.segments))
            with convert_write_errors(out):
                new = _with_checksums(new, write_checksums(building / "store"))
                shutil.rmtree(folder, ignore_errors=True)  # Of an append that was killed here.
                folder.parent.mkdir(exist_ok=True)
                os.rename(building / "store", folder)
                existing = append_manifest(existing, new)
                write_manifest(out, existing)
        shutil.rmtree(building, ignore_errors=True)
    return existing


def _with_segments(store: TokenStore) -> Manifest:
    """The manifest; its one segment is told apart also where an older maxlm wrote it."""
    manifest = store.manifest
    if manifest.segments:
        return manifest
    segment = StoreSegment(
        num_tokens=manifest.num_tokens,
        num_documents=manifest.num_documents,
        num_sources=len(manifest.sources),
        offsets_sha256=store.offsets_sha256,
        selection=manifest.selection,
    )
    return manifest.model_copy(update={"segments": (segment,)})


def _share_parts(
    plan: BuildPlan, building: Path, out: Path, force: bool, pool: WorkerPool, progress: Progress
) -> None:
    """Make parts beside other builders, until none is left that nobody makes."""
    with lock_folder(building, shared=True, wait=True):
        if check_replaceable(out, plan.manifest, force):  # Finished while we waited.
            return
        with convert_write_errors(building), open(building / "plan.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (building / "plan").exists() and (building / "plan").read_text() != plan.key:
                what = "other inputs are being built here, or were once"
                fix = "give all builders the same inputs, or remove this folder"
                raise MaxlmError(what, where=str(building), fix=fix)
            _forget_other_plan(building, plan.key)
            (building / "parts").mkdir(exist_ok=True)
        _make_parts(plan.jobs(building / "parts"), make_unclaimed_part, pool, progress)


def _write_segment(
    plan: BuildPlan, building: Path, base: int, pool: WorkerPool, progress: Progress
) -> Manifest:
    """Make the arrays in `building/store`; offsets begin with `base`. Returns the manifest."""
    _forget_other_plan(building, plan.key)
    with convert_write_errors(building):
        (building / "parts").mkdir(exist_ok=True)
    made = _make_parts(plan.jobs(building / "parts"), make_part, pool, progress)
    parts = [made[index] for index in sorted(made)]
    manifest = _count(plan.manifest, parts)
    if not manifest.num_documents:
        shutil.rmtree(building)
        raise _no_documents(plan.source, manifest, plan.manifest.heldout_fraction)
    store = building / "store"
    with convert_write_errors(building):
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir()
    tokens_digest, offsets_digest = assemble(
        store,
        building / "parts",
        parts,
        manifest.dtype,
        pool,
        lambda done, total: progress("writing tokens", done, total),
        base,
    )
    segment = StoreSegment(
        num_tokens=manifest.num_tokens,
        num_documents=manifest.num_documents,
        num_sources=len(manifest.sources),
        offsets_sha256=offsets_digest,
        tokens_sha256=tokens_digest,
        selection=manifest.selection,
    )
    return manifest.model_copy(update={"segments": (segment,)})


def _with_checksums(manifest: Manifest, digest: str) -> Manifest:
    (segment,) = manifest.segments
    segment = segment.model_copy(update={"checksums_sha256": digest})
    return manifest.model_copy(update={"segments": (segment,)})


def _forget_other_plan(building: Path, key: str) -> None:
    """Empty the folder if it was left by a build of anything else."""
    path = building / "plan"
    with convert_write_errors(building):
        if path.exists() and path.read_text() == key:
            return
        shutil.rmtree(building / "parts", ignore_errors=True)
    with replace_file(path) as new:
        new.write_text(key)


def _make_parts(
    jobs: Sequence[PartJob],
    make: Callable[[PartJob], FinishedPart | None],
    pool: WorkerPool,
    progress: Progress,
) -> dict[int, FinishedPart]:
    """The parts by index, without those for which `make` returns None."""
    itemsize = token_dtype(jobs[0].planned.vocab_size).itemsize
    sizes = [sum(each.slice.size for each in job.slices) for job in jobs]
    parts: dict[int, FinishedPart] = {}
    for job in jobs:
        if part := read_finished_part(job.folder, job.index, itemsize):
            parts[job.index] = part
    done, total = sum(sizes[index] for index in parts), sum(sizes)
    progress("tokenizing", done, total)
    for part in pool.map(make, [job for job in jobs if job.index not in parts]):
        if part is not None:
            parts[part.index] = part
            done += sizes[part.index]
            progress("tokenizing", done, total)
    return parts


def _count(planned: Manifest, parts: Sequence[FinishedPart]) -> Manifest:
    """The manifest with the parts' counts filled in."""
    counts = [SourceCounts()] * len(planned.sources)
    for part in parts:
        for source, each in part.counts.items():
            counts[source] += each
    total = sum(counts, SourceCounts())
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
    """Move the finished store to its place, by rename; `_finish_swap` mends a kill between two."""
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


def _clear(building: Path) -> None:
    """Delete what a build that is done has left, unless another process is at work there."""
    if building.exists():
        with contextlib.suppress(MaxlmError), lock_folder(building):
            shutil.rmtree(building, ignore_errors=True)


def _finish_swap(out: Path, building: Path, *, wait: bool = False) -> None:
    """Put the old store back if a kill came after it was moved away and before the new one came."""
    replaced = building / "replaced"
    if replaced.exists() and not out.exists():
        with lock_folder(building, wait=wait), convert_write_errors(out):
            if replaced.exists() and not out.exists():
                os.rename(replaced, out)
