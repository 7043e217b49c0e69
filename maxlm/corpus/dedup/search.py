"""The search for near-duplicates, as jobs over shards and over ranges of hashes.

1. Each shard: a key for each band of each member's signature.
2. Each range of the hash of all words: which members are copies of another; only the best of them
   takes part in what follows.
3. Each band and range of its keys: pairs of members with the same key, the candidates.
4. Each range of pairs: its candidates, each once.
5. Each shard: the sets of n-grams of its members that are in a pair.
6. Each range of pairs: their exact similarity.

A job whose files are there is not done again, so a killed run goes on where it stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from maxlm.corpus.dedup.candidates import (
    count_pairs,
    find_copies,
    find_pair_range_starts,
    find_pairs,
    join_pairs,
    read_pairs_in_range,
    split_pairs,
    write_bands,
)
from maxlm.corpus.dedup.columns import concatenate, open_columns, write_columns
from maxlm.corpus.dedup.members import MemberList, Members, get_member_path, number_members
from maxlm.corpus.dedup.minhash import Banding, compute_band_keys, make_shingle_set
from maxlm.corpus.dedup.steps import StepRunner
from maxlm.corpus.shards import StageShardView
from maxlm.runtime.files import convert_write_errors, replace_file

_KEY_BYTES = 64  # A member's share of the memory of a job that sorts keys.
_PAIR_BYTES = 64  # A pair's, where pairs are sorted or verified.


@dataclass(frozen=True)
class NearSearch:
    """The settings of a search; see the settings of `NearStage`."""

    jaccard: float
    ngram: int
    banding: Banding
    max_group: int
    reads: tuple[str, ...]
    keep_by: str | None
    memory: int


@dataclass(frozen=True)
class FoundPairs:
    """Pairs that are alike. See `components.resolve`."""

    members: Members
    pairs: tuple[np.ndarray, np.ndarray]
    jaccard: np.ndarray
    copies: tuple[np.ndarray, np.ndarray]


def find_alike(
    search: NearSearch, shards: Sequence[StageShardView], scratch: Path, steps: StepRunner
) -> FoundPairs:
    """Find the pairs of documents that are as alike as is asked for.

    The memory of this process grows with what is found: 24 bytes for each pair, 72 for each copy.
    """
    steps.run("signatures", _sign_shard, [_ShardJob(search, s, scratch) for s in shards])
    members = number_members(scratch, shards)
    number = max(1, -(-members.total * _KEY_BYTES // search.memory))
    # Not to be mixed up with what a killed run of other ranges left.
    keys = _RangeJob(search, members, scratch / f"keys-{number}", number)
    every = [replace(keys, which=i) for i in range(number)]
    steps.run("copies", _find_copies, every)
    _gather_copies(keys)
    bands = range(1, search.banding.bands + 1)
    steps.run("candidates", _find_pairs, [replace(e, band=b) for b in bands for e in every])

    files = tuple(sorted(keys.folder.glob("pairs-*.arrow")))
    number = max(1, -(-count_pairs(files) * _PAIR_BYTES // search.memory))
    pairs = _RangeJob(search, members, keys.folder / f"merged-{number}", number, files=files)
    if not pairs.starts.exists():
        write_columns(pairs.starts, {"pair": find_pair_range_starts(files, number)})
    every = [replace(pairs, which=i) for i in range(number)]
    steps.run("pairs", _merge_pairs, every)
    steps.run("n-grams", _write_sets, [_SetJob(s, i, pairs) for i, s in enumerate(shards)])
    steps.run("verify", _verify, every)
    verified, jaccard = [], []
    for each in every:
        with open_columns(each.file("verified")) as columns:
            verified.append(columns["pair"])
            jaccard.append(columns["jaccard"])
    with open_columns(keys.folder / "copies.arrow") as columns:
        copies = columns["member"].copy(), columns["best"].copy()
    alike = split_pairs(concatenate(verified, np.uint64))
    return FoundPairs(members, alike, concatenate(jaccard, np.float64), copies)


@dataclass(frozen=True)
class _ShardJob:
    search: NearSearch
    shard: StageShardView
    scratch: Path


def _sign_shard(job: _ShardJob) -> None:
    search, shard = job.search, job.shard
    out = get_member_path(job.scratch, shard.name)
    if out.exists():
        return
    members, banding = MemberList(search.keep_by), search.banding
    keys, worded = [np.empty((banding.bands + 1, 0), np.uint64)], []
    for group in shard.rows((*members.reads, *search.reads)):
        batch = group.batch
        key, count = compute_band_keys(batch.column("text").to_pylist(), search.ngram, banding)
        keys.append(key)
        worded.append(count > 0)
        members.add(group)
    write_bands(job.scratch, shard.name, np.concatenate(keys, axis=1), concatenate(worded, bool))
    members.write(out)


@dataclass(frozen=True)
class _RangeJob:
    search: NearSearch
    members: Members
    folder: Path
    number: int
    which: int = 0
    band: int = 0
    files: tuple[Path, ...] = ()

    def file(self, what: str) -> Path:
        return self.folder / f"{what}-{self.which}.arrow"

    @property
    def starts(self) -> Path:
        """The file that says where the ranges of pairs begin."""
        return self.folder / "starts.arrow"


def _find_copies(job: _RangeJob) -> None:
    if not job.file("copies").exists():
        member, best = find_copies(job.members, job.number, job.which)
        write_columns(job.file("copies"), {"member": member, "best": best})


def _gather_copies(job: _RangeJob) -> None:
    """Join what was found in all ranges, in order of members; their pairs are candidates too."""
    member, best = [], []
    for which in range(job.number):
        with open_columns(replace(job, which=which).file("copies")) as columns:
            member.append(columns["member"])
            best.append(columns["best"])
    members, bests = concatenate(member, np.int64), concatenate(best, np.int64)
    order = np.argsort(members)
    columns = {"member": members[order], "best": bests[order]}
    write_columns(job.folder / "pairs-0.arrow", {"pair": np.sort(join_pairs(members, bests))})
    write_columns(job.folder / "copies.arrow", columns)


def _find_pairs(job: _RangeJob) -> None:
    """Write a band's candidates in files of bounded size, each sorted."""
    name = f"{job.band}-{job.which}"
    done = job.folder / f"{name}.done"
    if done.exists():
        return
    with open_columns(job.folder / "copies.arrow") as columns:
        copies = columns["member"]
    found = find_pairs(job.members, job.band, job.number, job.which, copies, job.search.max_group)
    most = max(1, job.search.memory // _PAIR_BYTES)
    piece, size, number = [], 0, 0
    for pairs in chain(found, [None]):
        if piece and (pairs is None or size + len(pairs) > most):
            path = job.folder / f"pairs-{name}-{number}.arrow"
            write_columns(path, {"pair": np.unique(concatenate(piece, np.uint64))})
            piece, size, number = [], 0, number + 1
        if pairs is not None:
            piece.append(pairs)
            size += len(pairs)
    with convert_write_errors(done):
        done.touch()


def _merge_pairs(job: _RangeJob) -> None:
    if job.file("needed").exists():
        return
    with open_columns(job.starts) as columns:
        pairs = read_pairs_in_range(job.files, columns["pair"], job.which)
    write_columns(job.file("candidates"), {"pair": pairs})
    write_columns(job.file("needed"), {"member": np.unique(np.concatenate(split_pairs(pairs)))})


@dataclass(frozen=True)
class _SetJob:
    shard: StageShardView
    which: int
    pairs: _RangeJob


def _write_sets(job: _SetJob) -> None:
    """Write the sets of n-grams of a shard's members that are in a pair.

    They go to disk a row group at a time, end to end, and after them a file with the columns
    member (rising) and start (where its set begins). A last row, of no member, ends the last set.
    """
    members, out = job.pairs.members, _set_file(job.pairs, job.which)
    if out.exists():
        return
    needed = _needed(job)
    with open_columns(members.file(job.which)) as columns:
        rows = columns["row"][needed]
    sizes = [0]
    with convert_write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(_hash_file(out)) as new, new.open("wb") as file:
        for group in job.shard.rows(("text",)):
            start, stop = np.searchsorted(rows, [group.first, group.first + group.size])
            texts = group.batch.column("text")
            places = np.searchsorted(group.index, rows[start:stop] - group.first).tolist()
            size = job.pairs.search.ngram
            sets = [make_shingle_set(texts[place].as_py(), size) for place in places]
            concatenate(sets, np.uint64).tofile(file)
            sizes += [len(each) for each in sets]
    first, end = members.first[job.which : job.which + 2]
    columns = {"member": np.append(needed + first, end), "start": np.cumsum(sizes, dtype=np.int64)}
    write_columns(out, columns)


def _needed(job: _SetJob) -> np.ndarray:
    """The members of a shard that are in a pair, counted within the shard: int64, rising."""
    first, end = job.pairs.members.first[job.which : job.which + 2]
    needed = np.zeros(end - first, np.bool_)
    for which in range(job.pairs.number):
        with open_columns(replace(job.pairs, which=which).file("needed")) as columns:
            part = slice(*np.searchsorted(columns["member"], [first, end]))
            needed[columns["member"][part] - first] = True
    return np.flatnonzero(needed)


def _set_file(job: _RangeJob, shard: int) -> Path:
    return job.folder / "sets" / f"{job.members.shards[shard]}.arrow"


def _hash_file(set_file: Path) -> Path:
    return set_file.with_suffix(".hashes")


def _verify(job: _RangeJob) -> None:
    """Write the candidates of a range that are as alike as is asked for."""
    if job.file("verified").exists():
        return
    with open_columns(job.file("candidates")) as columns:
        pairs = columns["pair"]
    low, high = split_pairs(pairs)
    jaccard = np.empty(len(pairs))
    for shard, part in job.members.by_shard(low):
        one = _Sets.open(_set_file(job, shard))
        order = np.argsort(high[part], kind="stable") + part.start
        for other, there in job.members.by_shard(high[order]):
            here = order[there]
            two = _Sets.open(_set_file(job, other))
            sets = zip(one.read(low[here]), two.read(high[here]), strict=True)
            jaccard[here] = [_compute_jaccard(a, b) for a, b in sets]
    alike = jaccard >= job.search.jaccard
    write_columns(job.file("verified"), {"pair": pairs[alike], "jaccard": jaccard[alike]})


@dataclass(frozen=True)
class _Sets:
    """The files that `_write_sets` wrote, on disk until it is looked at."""

    member: np.ndarray
    start: np.ndarray
    hashes: np.ndarray

    @classmethod
    def open(cls, path: Path) -> "_Sets":
        # A shard that is opened has members in pairs, and each has an n-gram: no file is empty.
        hashes = np.memmap(_hash_file(path), np.uint64, "r")
        with open_columns(path) as columns:
            return cls(columns["member"], columns["start"], hashes)

    def read(self, members: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the set of each member."""
        for place in np.searchsorted(self.member, members).tolist():
            yield self.hashes[self.start[place] : self.start[place + 1]]


def _compute_jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
