"""Near-duplicates in files: candidates by ranges, and what a job of the search holds in memory."""

import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.corpus.dedup import minhash
from maxlm.corpus.dedup.candidates import (
    find_copies,
    find_pair_range_starts,
    find_pairs,
    read_pairs_in_range,
    split_pairs,
    write_bands,
)
from maxlm.corpus.dedup.columns import write_columns
from maxlm.corpus.dedup.members import Members, get_member_path
from maxlm.corpus.stages.near import NearStage
from maxlm.runtime.progress import ignore_progress
from tests.corpus.corpora import labels, make_corpus

Job = TypeVar("Job")
Result = TypeVar("Result")


@pytest.mark.parametrize(("size", "limit"), [(2, 8), (8, 8), (9, 8), (500, 8), (500, 1000)])
def test_pairs_of_a_group(tmp_path: Path, size: int, limit: int) -> None:
    rank = np.random.default_rng(size).permutation(size).astype(float)
    write_columns(get_member_path(tmp_path, "s"), {"rank": rank})
    write_bands(tmp_path, "s", np.full((2, size), 7, np.uint64), np.ones(size, np.bool_))
    members = Members(tmp_path, ("s",), (0, size))
    none = np.empty(0, np.int64)
    found = np.unique(np.concatenate([*find_pairs(members, 1, 1, 0, none, limit)]))
    low, high = split_pairs(found)
    assert (low < high).all()
    if size <= limit:
        assert len(found) == size * (size - 1) // 2
    else:
        assert len(found) <= size * limit // 2
        pairs = set(zip(low.tolist(), high.tolist(), strict=True))
        best = int(np.argmax(rank))
        assert all((min(i, best), max(i, best)) in pairs for i in range(size) if i != best)


def test_ranges_of_pairs_hold_about_as_many(tmp_path: Path) -> None:
    # All are paired with the same few, the first members: there are no better ones.
    size, number = 20_000, 16
    write_columns(get_member_path(tmp_path, "s"), {"rank": np.zeros(size)})
    write_bands(tmp_path, "s", np.full((2, size), 7, np.uint64), np.ones(size, np.bool_))
    members = Members(tmp_path, ("s",), (0, size))
    pairs = np.concatenate([*find_pairs(members, 1, 1, 0, np.empty(0, np.int64), 50)])
    files = [tmp_path / f"pairs-{i}.arrow" for i in range(41)]
    for path, part in zip(files, [*np.array_split(pairs, 40), pairs[:0]], strict=True):
        write_columns(path, {"pair": np.unique(part)})
    starts = find_pair_range_starts(files, number)
    found = [read_pairs_in_range(files, starts, i) for i in range(number)]
    assert (np.concatenate(found) == np.unique(pairs)).all()
    assert max(map(len, found)) < 1.1 * len(np.unique(pairs)) / number


@given(st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9))), st.integers(1, 5))
def test_every_pair_is_in_one_range(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], number: int
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    files = [folder / f"{i}.arrow" for i in range(len(parts))]
    for path, part in zip(files, parts, strict=True):
        write_columns(path, {"pair": np.unique(np.array(part, np.uint64))})
    starts = find_pair_range_starts(files, number)
    found = [each for i in range(number) for each in read_pairs_in_range(files, starts, i).tolist()]
    assert found == sorted({each for part in parts for each in part})


def test_copies_are_those_of_the_best_in_any_shard(tmp_path: Path) -> None:
    random_ = np.random.default_rng(4)
    key, rank = random_.integers(0, 60, 200), random_.integers(0, 3, 200)
    first = (0, 40, 40, 130, 200)
    for shard, (start, end) in enumerate(pairwise(first)):
        part = slice(start, end)
        write_columns(get_member_path(tmp_path, str(shard)), {"rank": rank[part].astype(float)})
        keys = key[None, part].astype(np.uint64) << np.uint64(58)
        write_bands(tmp_path, str(shard), keys, np.ones(end - start, np.bool_))
    members = Members(tmp_path, ("0", "1", "2", "3"), first)
    found = {}
    for which in range(3):
        copies, originals = find_copies(members, 3, which)
        found |= dict(zip(copies.tolist(), originals.tolist(), strict=True))
    best = {k: max(np.flatnonzero(key == k), key=lambda i: (rank[i], -i)) for k in key.tolist()}
    assert found == {i: best[k] for i, k in enumerate(key.tolist()) if best[k] != i}


class Alone:
    """An engine that runs jobs in this process."""

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        return map(function, jobs)


def test_memory_does_not_grow_with_the_row_groups_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache of words, of which there are no two alike here, comes on top.
    monkeypatch.setattr(minhash, "_hash_word", minhash._hash_word.__wrapped__)
    random_ = random.Random(7)
    pages = [" ".join(f"{random_.random()}" for _ in range(1000)) for _ in range(200)]
    documents = [text for page in pages for text in (page, f"{page} end")]
    (shard,) = make_corpus(tmp_path / "corpus", documents, 1, rows_per_group=10)
    stage, scratch = NearStage(max_share=1, memory=1 << 18), tmp_path / "scratch"
    scratch.mkdir()
    stage.label([replace(shard, out="near")], scratch, Alone(), ignore_progress)
    for path in [*scratch.rglob("sets/*"), *scratch.rglob("verified-*")]:
        path.unlink()  # To be made once more, with all loops compiled.
    tracemalloc.start()
    stage.label([replace(shard, out="near")], scratch, Alone(), ignore_progress)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(labels([shard], stage)["duplicate"].to_pylist()) == 200
    assert peak < len(documents) * 1000 * 8 / 4  # A quarter of all sets of n-grams.
