"""The search for near-duplicates, as jobs over shards and over ranges of hashes.

1. Each shard: each member's set of n-grams, and a key for each band of its signature.
2. Each band and range of its keys: pairs of members with the same key, the candidates.
3. Each range of pairs: the exact similarity of its candidates.

A job whose files are there is not done again, so a killed run goes on where it stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path

import numpy as np

from maxlm.corpus.dedup.candidates import (
    count_pairs,
    find_pair_range_starts,
    find_pairs,
    read_pairs_in_range,
    split_pairs,
    write_bands,
)
from maxlm.corpus.dedup.columns import concatenate, open_columns, write_columns
from maxlm.corpus.dedup.components import SimilarPairs
from maxlm.corpus.dedup.members import MemberList, Members, get_member_path, number_members
from maxlm.corpus.dedup.minhash import Banding, compute_band_keys, make_shingle_set
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import JobRunner
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


def find_alike(
    search: NearSearch, shards: Sequence[StageShardView], scratch: Path, run: JobRunner
) -> tuple[Members, SimilarPairs]:
    """Find the pairs of documents that are as alike as is asked for.

    The memory of this process grows with what is found: 24 bytes for each pair.
    """
    run(partial(_sign_shard, search, scratch), shards, "signatures")
    members = number_members(scratch, shards)
    number = max(1, -(-members.total * _KEY_BYTES // search.memory))
    folder = scratch / f"keys-{number}"  # A killed run may have had other ranges.
    parts = list(product(range(1, search.banding.bands + 1), range(number)))
    run(partial(_write_pairs, search, members, folder, number), parts, "candidates")

    found = sorted(folder.glob("pairs-*.arrow"))
    number = max(1, -(-count_pairs(found) * _PAIR_BYTES // search.memory))
    starts = find_pair_range_starts(found, number)
    files = [folder / f"verified-{number}-{i}.arrow" for i in range(number)]
    verify = partial(_verify, search.jaccard, members, found, starts)
    run(verify, list(enumerate(files)), "verify")
    verified, jaccard = [], []
    for file in files:
        with open_columns(file) as columns:
            verified.append(columns["pair"])
            jaccard.append(columns["jaccard"])
    low, high = split_pairs(concatenate(verified, np.uint64))
    return members, SimilarPairs(low, high, concatenate(jaccard, np.float64))


def _set_file(scratch: Path, shard: str) -> Path:
    """The sets of a shard's members, end to end; beside it where each begins (.arrow)."""
    return scratch / "sets" / f"{shard}.hashes"


def _sign_shard(search: NearSearch, scratch: Path, shard: StageShardView) -> None:
    out, file = get_member_path(scratch, shard.name), _set_file(scratch, shard.name)
    if out.exists() and file.exists():
        return
    members, banding = MemberList(search.keep_by), search.banding
    keys, sizes = [np.empty((banding.bands, 0), np.uint64)], []
    with convert_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as new, new.open("wb") as stream:
        for group in shard.rows((*members.reads, *search.reads)):
            texts = group.batch.column("text").to_pylist()
            sets = [make_shingle_set(text, search.ngram) for text in texts]
            concatenate(sets, np.uint64).tofile(stream)
            sizes += map(len, sets)
            keys.append(compute_band_keys(sets, banding))
            members.add(group)
    write_columns(file.with_suffix(".arrow"), {"start": np.cumsum([0, *sizes], dtype=np.int64)})
    write_bands(scratch, shard.name, np.concatenate(keys, axis=1), np.array(sizes, bool))
    members.write(out)


def _write_pairs(
    search: NearSearch, members: Members, folder: Path, number: int, part: tuple[int, int]
) -> None:
    """Write the candidates of a band and range in files of bounded size, each sorted."""
    band, which = part
    done = folder / f"{band}-{which}.done"
    if done.exists():
        return
    found = find_pairs(members, band, number, which, search.max_group)
    most = max(1, search.memory // _PAIR_BYTES)
    piece, size, written = [], 0, 0
    for pairs in chain(found, [None]):
        if piece and (pairs is None or size + len(pairs) > most):
            path = folder / f"pairs-{band}-{which}-{written}.arrow"
            write_columns(path, {"pair": np.unique(concatenate(piece, np.uint64))})
            piece, size, written = [], 0, written + 1
        if pairs is not None:
            piece.append(pairs)
            size += len(pairs)
    with convert_write_errors(done):
        folder.mkdir(parents=True, exist_ok=True)
        done.touch()


def _verify(
    least: float,
    members: Members,
    found: Sequence[Path],
    starts: np.ndarray,
    part: tuple[int, Path],
) -> None:
    """Write the candidates of a range of pairs whose Jaccard similarity is `least` or more."""
    which, out = part
    if out.exists():
        return
    candidates = read_pairs_in_range(found, starts, which)
    low, high = split_pairs(candidates)
    jaccard = np.empty(len(candidates))
    for shard, here in members.by_shard(low):
        order = np.argsort(high[here], kind="stable") + here.start
        for other, there in members.by_shard(high[order]):
            pairs = order[there]
            ones, others = (
                _read_sets(members, number, ends[pairs])
                for number, ends in ((shard, low), (other, high))
            )
            jaccard[pairs] = [compute_jaccard(a, b) for a, b in zip(ones, others, strict=True)]
    alike = jaccard >= least
    write_columns(out, {"pair": candidates[alike], "jaccard": jaccard[alike]})


def _read_sets(members: Members, shard: int, which: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the sets of members of a shard, which have n-grams: no file is empty."""
    file = _set_file(members.folder, members.shards[shard])
    hashes = np.memmap(file, np.uint64, "r")
    with open_columns(file.with_suffix(".arrow")) as columns:
        start = columns["start"]
        for place in (which - members.first[shard]).tolist():
            yield hashes[start[place] : start[place + 1]]


def compute_jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sets, each without repeats."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
