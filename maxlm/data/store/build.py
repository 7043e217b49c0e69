"""Building a token store: documents in, one finished folder out."""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError, check_local_path, check_path_is_text
from maxlm.data.documents.config import SourceConfig
from maxlm.data.store.arrays import (
    SHARD_TOKENS,
    create_array,
    open_for_writing,
    write_array,
)
from maxlm.data.store.manifest import (
    MANIFEST_NAME,
    Manifest,
    SourceEntry,
    Split,
    StoreSegment,
    append_manifest,
    describe_differences,
    hash_digests,
    is_already_appended,
    read_manifest,
    segment_path,
    write_manifest,
)
from maxlm.data.store.parts import (
    BuildPlan,
    FinishedPart,
    part_path,
    plan_build,
    read_finished_part,
    tokenize_part,
)
from maxlm.data.store.store import TokenStore
from maxlm.runtime.checksums import write_checksums
from maxlm.runtime.files import convert_write_errors, lock_folder
from maxlm.runtime.pool import WorkerPool
from maxlm.runtime.progress import Progress, ignore_progress


def build_store(
    source: SourceConfig,
    tokenizer_folder: Path | str,
    out: Path | str,
    *,
    split: Split = "all",
    heldout_fraction: float = 0.0,
    workers: int | None = None,
    progress: Progress = ignore_progress,
    force: bool = False,
    join: bool = False,
) -> Manifest:
    """Tokenize a corpus into a token store in folder `out`.

    `out` appears only when it is complete. Until then finished parts lie beside it in
    `.NAME.building`; a build that was killed goes on from them, and its result is the
    same, bit for bit, as that of an unbroken one, whatever the number of workers. If
    `out` already holds the store of these inputs nothing is done but to hash the files.

    Args:
        tokenizer_folder: a saved tokenizer; the store keeps a copy.
        split: which documents to take: those held out, the others, or all.
        heldout_fraction: the share held out, by `is_heldout`; not used for "all".
        workers: processes; by default the cores this process may use. 1 works in this
            process.
        force: replace a store of other inputs.
        join: work beside other builders of this store, on this machine or on others
            that share the disk, each called the same way. Parts go to whoever is free;
            the last to be done writes the store while the others wait, and all return.

    Raises:
        MaxlmError: anything `read_documents` refuses; no documents; `out` holds a store
            of other inputs (names the difference) or something that is no store; a disk
            that is full or cannot be written; a build of the same store by another
            process, without `join`.
    """
    out = Path(check_path_is_text(check_local_path(out)))
    tokenizer_folder = Path(tokenizer_folder)
    plan = plan_build(source, tokenizer_folder, split, heldout_fraction, workers)
    building = out.with_name(f".{out.name}.building")
    existing = _read_same_store(out, plan.manifest, force)
    if existing:
        return existing
    with WorkerPool(workers) as pool:
        if join:
            with lock_folder(building, shared=True, wait=True):
                # Another builder may have finished it while we waited.
                if not _read_same_store(out, plan.manifest, force):
                    _make_parts(plan, building, pool, progress)
        with lock_folder(building, wait=join):
            replaced = building / "replaced"
            # Where a kill came between the two renames below, undo the first.
            if replaced.exists() and not out.exists():
                os.rename(replaced, out)
            # Meanwhile another builder may have finished it, or another store.
            manifest = _read_same_store(out, plan.manifest, force)
            if not manifest:
                manifest = _write_segment(plan, building, None, pool, progress)
                with convert_write_errors(building):
                    write_manifest(building / "store", manifest)
                    if out.exists():
                        # It may be left of a build that was killed at its end.
                        shutil.rmtree(replaced, ignore_errors=True)
                        os.rename(out, replaced)
                    os.rename(building / "store", out)
            shutil.rmtree(building, ignore_errors=True)
    return manifest


def append_store(
    source: SourceConfig,
    out: Path | str,
    *,
    workers: int | None = None,
    progress: Progress = ignore_progress,
) -> Manifest:
    """Add the documents of more files to the store in folder `out`, as a new segment.

    They come after those that are there, which keep their numbers and are not touched;
    tokenizer, split and fraction are the store's. The segment counts from when the
    manifest is replaced, at the end: readers that opened the store before go on with
    what it was. A killed append goes on when it is called again; one that is done is
    not done twice. Arguments are `build_store`'s.
    """
    out = Path(check_path_is_text(check_local_path(out)))
    existing = TokenStore.open(out).manifest
    plan = plan_build(
        source,
        out / "tokenizer",
        existing.split,
        existing.heldout_fraction,
        workers,
    )
    building = out.with_name(f".{out.name}.building")
    with WorkerPool(workers) as pool, lock_folder(building):
        # Again, now that no other append can change it.
        existing = TokenStore.open(out).manifest
        if not is_already_appended(str(out), existing, plan.manifest):
            new = _write_segment(plan, building, existing.num_tokens, pool, progress)
            folder = out / segment_path(len(existing.segments))
            with convert_write_errors(out):
                # It may be left of an append that was killed here.
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(exist_ok=True)
                os.rename(building / "store", folder)
                existing = append_manifest(existing, new)
                write_manifest(out, existing)
        shutil.rmtree(building, ignore_errors=True)
    return existing


def _read_same_store(out: Path, planned: Manifest, force: bool) -> Manifest | None:
    """The manifest of the store in `out` if it is the planned one; None if `out` may be
    written. Raises MaxlmError: `out` holds anything else, or, without `force`, a store
    of other inputs."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        message = "this exists and is not a token store"
        raise MaxlmError(
            message, where=str(out), fix="choose another folder or remove it"
        )
    try:
        difference = next(describe_differences(read_manifest(out), planned), None)
        if difference is None:
            return TokenStore.open(out).manifest
    except MaxlmError:  # A damaged store may be replaced, too.
        if not force:
            raise
        return None
    if force:
        return None
    fix = "choose another folder, or replace the store with --force (force=True)"
    message = f"the store here was built from other inputs: {difference}"
    raise MaxlmError(message, where=str(out), fix=fix)


def _write_segment(
    plan: BuildPlan,
    building: Path,
    tokens_before: int | None,
    pool: WorkerPool,
    progress: Progress,
) -> Manifest:
    """Make the arrays of a segment in `building/store`. Returns its manifest.

    The store has `tokens_before` tokens before it; None: it is a new store's, and gets
    the tokenizer.
    """
    part_by_index = _make_parts(plan, building, pool, progress)
    parts = [part_by_index[index] for index in sorted(part_by_index)]
    sources = _count_by_source(plan.manifest, parts)
    if not any(source.num_documents for source in sources):
        shutil.rmtree(building)
        raise _make_no_documents_error(plan)
    store = building / "store"
    parts_folder = building / plan.parts_name
    with convert_write_errors(building):
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir()

    shard_digests = _write_token_array(
        store, parts_folder, plan.manifest.dtype, parts, pool, progress
    )
    paths = (part_path(parts_folder, part.index, "lengths") for part in parts)
    lengths = np.concatenate([np.fromfile(path, np.int64) for path in paths])
    # Offsets count from the beginning of the store, not of the segment.
    offsets = np.cumsum(np.append(tokens_before or 0, lengths))
    array = create_array(store, "offsets", offsets.size, "int64")
    for start in range(0, offsets.size, SHARD_TOKENS):
        write_array(array, start, offsets[start : start + SHARD_TOKENS], store)
    if tokens_before is None:
        plan.tokenizer.save(store / "tokenizer")
    # Last: of all files that are there.
    with convert_write_errors(building):
        checksums_sha256 = write_checksums(store)

    segment = StoreSegment(
        num_tokens=sum(part.num_tokens for part in parts),
        num_documents=lengths.size,
        num_sources=len(sources),
        selection=plan.manifest.selection,
        offsets_sha256=hashlib.sha256(offsets.data).hexdigest(),
        tokens_sha256=hash_digests(shard_digests),
        checksums_sha256=checksums_sha256,
    )
    return plan.manifest.with_segments((segment,), sources)


def _write_token_array(
    store: Path,
    parts_folder: Path,
    dtype: str,
    parts: Sequence[FinishedPart],
    pool: WorkerPool,
    progress: Progress,
) -> list[str]:
    """Writes the tokens of all parts as one array of a store; returns the hashes of its
    shards.

    A shard is one file and is written by one worker in one go, so the result does not
    depend on the number of workers.
    """
    part_starts = np.cumsum([0, *(part.num_tokens for part in parts)])
    num_tokens = int(part_starts[-1])
    create_array(store, "tokens", num_tokens, dtype)
    write = partial(_write_shard, store, parts_folder, dtype, part_starts)
    shard_starts = range(0, num_tokens, SHARD_TOKENS)
    num_written = 0
    digest_by_start: dict[int, str] = {}
    for start, digest in pool.map_unordered(write, shard_starts):
        digest_by_start[start] = digest
        num_written += min(SHARD_TOKENS, num_tokens - start)
        progress("writing tokens", num_written, num_tokens)
    return [digest_by_start[start] for start in shard_starts]


def _make_parts(
    plan: BuildPlan, building: Path, pool: WorkerPool, progress: Progress
) -> dict[int, FinishedPart]:
    """The parts by index, without those that another builder is making."""
    folder = building / plan.parts_name
    with convert_write_errors(building):
        folder.mkdir(exist_ok=True)
    sizes = [
        sum(file_slice.size_bytes for _, file_slice in job.slices) for job in plan.jobs
    ]
    total_bytes = sum(sizes)
    done_bytes = 0
    parts: dict[int, FinishedPart] = {}
    jobs = []
    for job in plan.jobs:
        part = read_finished_part(folder, job.index)
        if part is None:
            jobs.append(job)
        else:
            parts[job.index] = part
            done_bytes += sizes[job.index]
    progress("tokenizing", done_bytes, total_bytes)
    make = partial(tokenize_part, folder, plan.source, plan.tokenizer, plan.manifest)
    for part in pool.map_unordered(make, jobs):
        if part is not None:
            parts[part.index] = part
            done_bytes += sizes[part.index]
            progress("tokenizing", done_bytes, total_bytes)
    return parts


def _count_by_source(
    planned: Manifest, parts: Sequence[FinishedPart]
) -> tuple[SourceEntry, ...]:
    counts_by_source = [Counter[str]() for _ in planned.sources]
    for part in parts:
        for source_index, counts in part.counts.items():
            counts_by_source[source_index].update(counts)
    return tuple(
        source.model_copy(update=dict(counts))
        for source, counts in zip(planned.sources, counts_by_source, strict=True)
    )


def _make_no_documents_error(plan: BuildPlan) -> MaxlmError:
    where = ", ".join(plan.source.documents)
    manifest = plan.manifest
    if manifest.split == "all":
        message = f"the corpus is empty: no text in {len(manifest.sources)} files"
        return MaxlmError(message, where=where, fix="name files that hold text")
    message = (
        f'no document falls into the split "{manifest.split}" at heldout_fraction='
        f"{manifest.heldout_fraction}"
    )
    fix = "use more documents or another fraction"
    return MaxlmError(message, where=where, fix=fix)


def _write_shard(
    store: Path, parts_folder: Path, dtype: str, part_starts: np.ndarray, start: int
) -> tuple[int, str]:
    """Write the shard of tokens from `start` on; part i is tokens part_starts[i] to
    part_starts[i + 1]. Returns `start` and the shard's hash."""
    stop = min(start + SHARD_TOKENS, int(part_starts[-1]))
    shard = np.empty(stop - start, dtype)
    first_part = np.searchsorted(part_starts, start, "right") - 1
    stop_part = np.searchsorted(part_starts, stop)
    for index in range(first_part, stop_part):
        part_start = part_starts[index]
        part_stop = part_starts[index + 1]
        if part_start == part_stop:  # An empty file cannot be mapped.
            continue
        tokens = np.memmap(part_path(parts_folder, index, "tokens"), dtype, "r")
        low = max(part_start, start)
        high = min(part_stop, stop)
        part_tokens = tokens[low - part_start : high - part_start]
        shard[low - start : high - start] = part_tokens
    write_array(open_for_writing(store, "tokens"), start, shard, store)
    return start, hashlib.sha256(shard.data).hexdigest()
