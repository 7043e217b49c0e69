"""From finished parts to the arrays of a store."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maxlm.data.store.arrays import SHARD_TOKENS, create_array, open_for_writing, write_array
from maxlm.data.store.parts import FinishedPart, part_path
from maxlm.runtime.pool import WorkerPool


@dataclass(frozen=True)
class ShardJob:
    """One shard of the token array: tokens `start` to `stop` of the store."""

    store: Path
    parts_folder: Path
    dtype: str
    start: int
    stop: int
    pieces: tuple[tuple[int, int], ...]
    """(index, first token within the store) of each part that overlaps the shard."""


def assemble(
    store: Path,
    parts_folder: Path,
    parts: Sequence[FinishedPart],
    dtype: str,
    pool: WorkerPool,
    progress: Callable[[int, int], None],
    base: int = 0,
) -> tuple[str, str]:
    """Write `tokens/` and `offsets/` into the folder `store`; parts in order of their index.

    Offsets begin with `base`, which is how many tokens the store has before this segment. Returns
    the hashes of tokens and offsets, as `StoreSegment` has them.

    A shard is one file and is written by one worker in one go, so the result does not depend on
    the number of workers.
    """
    begins = np.concatenate([[0], np.cumsum([part.num_tokens for part in parts])])
    total = int(begins[-1])
    create_array(store, "tokens", total, dtype)
    done, digests = 0, {}
    jobs = _shard_jobs(store, parts_folder, parts, begins, dtype)
    for job, digest in pool.map(_write_shard, jobs):
        digests[job.start] = digest
        done += job.stop - job.start
        progress(done, total)
    tokens = "".join(digests[start] for start in sorted(digests))
    offsets = _write_offsets(store, parts_folder, parts, base)
    return hashlib.sha256(tokens.encode()).hexdigest(), offsets


def _write_offsets(
    store: Path, parts_folder: Path, parts: Sequence[FinishedPart], base: int
) -> str:
    paths = (part_path(parts_folder, part.index, "lengths") for part in parts)
    lengths = np.concatenate([np.fromfile(path, np.int64) for path in paths])
    offsets = np.cumsum(np.append(base, lengths))
    array = create_array(store, "offsets", offsets.size, "int64")
    for start in range(0, offsets.size, SHARD_TOKENS):
        write_array(array, start, offsets[start : start + SHARD_TOKENS], store)
    return hashlib.sha256(offsets.data).hexdigest()


def _shard_jobs(
    store: Path, parts_folder: Path, parts: Sequence[FinishedPart], begins: np.ndarray, dtype: str
) -> list[ShardJob]:
    jobs = []
    for start in range(0, int(begins[-1]), SHARD_TOKENS):
        stop = min(start + SHARD_TOKENS, int(begins[-1]))
        low = int(np.searchsorted(begins, start, "right")) - 1
        high = int(np.searchsorted(begins, stop, "left"))
        pieces = tuple(
            (parts[i].index, int(begins[i])) for i in range(low, high) if parts[i].num_tokens
        )
        jobs.append(ShardJob(store, parts_folder, dtype, start, stop, pieces))
    return jobs


def _write_shard(job: ShardJob) -> tuple[ShardJob, str]:
    shard = np.empty(job.stop - job.start, job.dtype)
    for index, begin in job.pieces:
        path = part_path(job.parts_folder, index, "tokens")
        tokens = np.memmap(path, job.dtype, "r")
        low, high = max(begin, job.start), min(begin + len(tokens), job.stop)
        shard[low - job.start : high - job.start] = tokens[low - begin : high - begin]
    write_array(open_for_writing(job.store, "tokens"), job.start, shard, job.store)
    return job, hashlib.sha256(shard.data).hexdigest()
