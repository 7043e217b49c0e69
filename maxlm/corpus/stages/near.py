"""Near-duplicates: documents that share most of what they say.

The search goes by jobs over shards and over ranges of hashes:

1. Each shard: each member's set of n-grams, and a key for each band of its signature.
2. Each range of digests of sets: members with equal sets, which are copies. Only the
   best of them goes on, so a text that is there a thousand times costs a thousand
   pairs, and no more.
3. Each band and range of its keys: pairs of members with the same key, the candidates.
4. Each range of pairs: the exact similarity of its candidates.

A job whose files are there is not done again, so a killed run goes on where it stopped.

A *member* is a document that takes part, by its number among all of these
(:mod:`~maxlm.corpus.dedup.members`); a *place* is a member's number within its shard.
Labels name documents by their ids, or by their numbers among all documents of the
corpus, members or not.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.corpus.dedup.columns import (
    count_ranges,
    get_shard_path,
    read_columns,
    read_range,
    write_columns,
)
from maxlm.corpus.dedup.copies import read_copies, sort_digests, write_copies
from maxlm.corpus.dedup.members import (
    SelectedDocuments,
    compute_keep_scores,
    open_selected_documents,
    write_labels,
    write_members,
)
from maxlm.corpus.dedup.minhash import (
    Banding,
    choose_banding,
    compute_band_keys,
    make_shingle_set,
)
from maxlm.corpus.dedup.pairs import (
    DuplicateMarks,
    count_pairs,
    find_candidate_pairs,
    find_pair_range_starts,
    resolve_duplicates,
    unpack_pairs,
    write_band_keys,
)
from maxlm.corpus.shards import SelectedRows, StageShardView
from maxlm.corpus.stage import CrossDocumentStage, JobRunner, LabelTypes, Verdicts
from maxlm.data.batching import batch_by_size
from maxlm.runtime.files import convert_write_errors, replace_file

# Bytes that a job needs for each of what it sorts, its columns and their sorted copies
# together: a member by its digest, a member by its key, a pair.
_DIGEST_JOB_BYTES = 256
_KEY_JOB_BYTES = 64
_PAIR_JOB_BYTES = 64
PAIRS_TYPE = pa.list_(pa.struct([("document", pa.int64()), ("jaccard", pa.float64())]))
"""The type of a label that holds documents, by their numbers in the corpus, and how
alike they are."""


class NearStage(CrossDocumentStage):
    """Finds documents whose sets of word n-grams overlap: Jaccard similarity >=
    `jaccard`.

    MinHash signatures in bands (`dedup.minhash`) give candidates and nothing else: each
    pair is verified by the exact Jaccard similarity of the two sets of n-grams before
    it counts. From the best document of a cluster to the worst, one is marked if it is
    like a document that is kept (`dedup.pairs`), so each marked document is verified
    against the one it is `of`, and chains of likeness delete nothing.

    Words are compared without case, accents and punctuation; in scripts without spaces
    each letter is a word (`maxlm.corpus.text`). A document of fewer words than an
    n-gram is one n-gram; one without words is like no other.
    """

    stage: Literal["near"] = "near"
    jaccard: float = Field(default=0.8, gt=0, le=1)
    """Documents are near-duplicates from this similarity on."""
    recall: float = Field(default=0.99, gt=0, lt=1)
    """The share of pairs of exactly that similarity that is to be found; of more
    similar pairs more are. A higher value costs time and scratch disk: see `hashes`."""
    ngram: int = Field(default=5, ge=1, le=100)
    """Words in an n-gram (shingle)."""
    hashes: int = Field(default=256, ge=1, le=4096)
    """Hash functions at most. More of them make fewer false candidates to verify, for
    more time a document; at 0.8 and 0.99 the default gives 26 bands of 8."""
    max_group: int = Field(default=50, ge=4)
    """Documents with a band in common are all compared with each other up to this
    number; in a larger group each with a quarter of this number of the best and with as
    many of the documents that follow it, so that boilerplate costs no quadratic time. A
    pair that this misses in one band is mostly found in another, where it shares
    something rarer than the boilerplate."""
    label_types: ClassVar[LabelTypes] = {
        "duplicate": pa.bool_(),
        "of": pa.large_string(),  # the kept document
        "jaccard": pa.float64(),  # with `of`
        "cluster": pa.int64(),  # null: like no other
        "cluster_size": pa.int64(),
        "pairs": PAIRS_TYPE,  # documents before this one in the corpus that are like it
    }
    verdicts: ClassVar[Verdicts] = {
        "duplicate": False,
        "of": None,
        "jaccard": None,
    }
    internal_labels: ClassVar[tuple[str, ...]] = ("pairs",)
    version: ClassVar[int] = 5
    packages: ClassVar[tuple[str, ...]] = ("regex", "scipy")
    depends_on_unicode: ClassVar[bool] = True

    @property
    def banding(self) -> Banding:
        """The bands, and the hash functions of each, that reach `recall`."""
        return choose_banding(self.jaccard, self.recall, self.hashes)

    def label(
        self, shards: Sequence[StageShardView], scratch: Path, run_jobs: JobRunner
    ) -> None:
        """See `CrossDocumentStage.label`. This process holds 24 bytes for each pair
        found."""
        run_jobs(partial(_hash_shard, self, scratch), shards, "signatures")
        members = open_selected_documents(scratch, shards)
        copies, sources = self._find_copies(members, run_jobs)
        pairs = self._find_pairs(members, run_jobs)
        # A copy and its source are a pair that needs no check.
        pairs = _VerifiedPairs(
            low=np.concatenate([pairs.low, np.minimum(copies, sources)]),
            high=np.concatenate([pairs.high, np.maximum(copies, sources)]),
            jaccard=np.concatenate([pairs.jaccard, np.ones(len(copies))]),
        )

        def get_ranks(numbers: np.ndarray) -> np.ndarray:
            return members.take("rank", numbers).to_numpy()

        marks = resolve_duplicates(pairs.low, pairs.high, pairs.jaccard, get_ranks)

        # Each shard's labels are written by a job, which gets its part of the marks.
        pairs_by_shard = _list_pairs_by_shard(members, pairs)
        label_jobs = []
        for index, shard in enumerate(shards):
            first_member, stop_member = members.shard_offsets[index : index + 2]
            job = _LabelJob(
                index=index,
                shard=shard,
                marks=marks.select(first_member, stop_member),
                pairs=pairs_by_shard[index],
            )
            label_jobs.append(job)
        run_jobs(partial(_label_shard, members), label_jobs, "label")

    def _find_pairs(
        self, members: SelectedDocuments, run_jobs: JobRunner
    ) -> "_VerifiedPairs":
        """Finds the pairs of members that are alike, but for those of copies."""
        # Names of files have the number of ranges: a killed run that had another, since
        # `memory` was another, has left files that must not be taken for these.
        num_ranges = count_ranges(members.num_selected, _KEY_JOB_BYTES, self.memory)
        folder = members.folder / f"keys-{num_ranges}"
        # Bands are counted from 1, as in the names of the columns of keys.
        bands = range(1, self.banding.num_bands + 1)
        bands_and_ranges = list(product(bands, range(num_ranges)))
        write_candidates = partial(_write_candidates, self, members, folder, num_ranges)
        run_jobs(write_candidates, bands_and_ranges, "candidates")

        candidates = sorted(folder.glob("pairs-*.arrow"))
        num_ranges = count_ranges(count_pairs(candidates), _PAIR_JOB_BYTES, self.memory)
        starts = find_pair_range_starts(candidates, num_ranges)
        paths = [folder / f"checked-{num_ranges}-{i}.arrow" for i in range(num_ranges)]
        verify = partial(_verify, self.jaccard, members, candidates, starts)
        run_jobs(verify, list(enumerate(paths)), "verify")

        verified = [read_columns(path) for path in paths]
        packed_pairs = np.concatenate([columns["pair"] for columns in verified])
        low, high = unpack_pairs(packed_pairs)
        jaccard = np.concatenate([columns["jaccard"] for columns in verified])
        return _VerifiedPairs(low, high, jaccard)

    def _find_copies(
        self, members: SelectedDocuments, run_jobs: JobRunner
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds members whose sets of n-grams others have, and the best member with
        each: int64 [copies] both. Writes down which are such copies, for the search of
        candidates."""
        num_ranges = count_ranges(members.num_selected, _DIGEST_JOB_BYTES, self.memory)
        digests = [
            get_shard_path(members.folder, "digests", name) for name in members.shards
        ]
        group = partial(
            write_copies, members.folder, digests, num_ranges, has_ranks=True
        )
        run_jobs(group, range(num_ranges), "copies")

        offsets = np.array(members.shard_offsets)
        # Empty ones first: a corpus may have no shards.
        copies = [np.empty(0, np.int64)]
        sources = [np.empty(0, np.int64)]
        for shard_index, shard_name in enumerate(members.shards):
            shard_copies = read_copies(members.folder, num_ranges, shard_index)
            member = offsets[shard_index] + shard_copies.place
            source = offsets[shard_copies.source_file] + shard_copies.source_place
            # The best of equal sets is its own source, and goes on to the search.
            has_other_source = member != source
            copies.append(member[has_other_source])
            sources.append(source[has_other_source])

            num_members = offsets[shard_index + 1] - offsets[shard_index]
            is_copy = np.zeros(num_members, np.uint8)
            is_copy[shard_copies.place[has_other_source]] = 1
            copy_marks_path = _get_copy_marks_path(members.folder, shard_name)
            write_columns(copy_marks_path, {"is_copy": is_copy})
        return np.concatenate(copies), np.concatenate(sources)


@dataclass(frozen=True)
class _VerifiedPairs:
    """Pairs of members that are alike; arrays have an entry for each."""

    low: np.ndarray
    """The smaller member: int64."""
    high: np.ndarray
    """The larger member: int64."""
    jaccard: np.ndarray
    """Their similarity: float64."""


@dataclass(frozen=True)
class _ShardPairs:
    """The pairs of a shard's members with members before them, in order of the
    members."""

    num_pairs: np.ndarray
    """How many each member has: int64 [members]."""
    documents: np.ndarray
    """The other one of each pair, by its number among all documents: int64 [pairs]."""
    jaccard: np.ndarray
    """How alike the two are: float64 [pairs]."""


@dataclass(frozen=True)
class _LabelJob:
    """A shard to be labelled."""

    index: int
    shard: StageShardView
    marks: DuplicateMarks
    """Those of the shard's members."""
    pairs: _ShardPairs


def _list_pairs_by_shard(
    members: SelectedDocuments, pairs: _VerifiedPairs
) -> list[_ShardPairs]:
    """Lists the pairs of each shard's members with members before them."""
    order = np.lexsort((pairs.low, pairs.high))
    high = pairs.high[order]
    documents = members.get_document_numbers(pairs.low[order])
    jaccard = pairs.jaccard[order]
    shard_pairs = []
    for first_member, stop_member in pairwise(members.shard_offsets):
        start, stop = np.searchsorted(high, [first_member, stop_member])
        places = high[start:stop] - first_member
        num_pairs = np.bincount(places, minlength=stop_member - first_member)
        shard_pairs.append(
            _ShardPairs(num_pairs, documents[start:stop], jaccard[start:stop])
        )
    return shard_pairs


def _label_shard(members: SelectedDocuments, job: _LabelJob) -> None:
    """Writes the labels of a shard."""
    pairs = pa.StructArray.from_arrays(
        [pa.array(job.pairs.documents), pa.array(job.pairs.jaccard)],
        fields=list(PAIRS_TYPE.value_type),
    )
    pair_offsets = np.concatenate([[0], np.cumsum(job.pairs.num_pairs)])
    rows = members.map_shard(job.index).column("row").to_numpy()

    # Members without a mark are like no other: -1 becomes null.
    duplicate_of = np.full(len(rows), -1, np.int64)
    cluster = np.full(len(rows), -1, np.int64)
    cluster_size = np.ones(len(rows), np.int64)
    jaccard = np.zeros(len(rows))
    places = job.marks.member - members.shard_offsets[job.index]
    duplicate_of[places] = job.marks.duplicate_of
    cluster[places] = job.marks.cluster
    cluster_size[places] = job.marks.cluster_size
    jaccard[places] = job.marks.jaccard

    labels = {
        "duplicate": duplicate_of >= 0,
        "of": members.take("id", duplicate_of),
        "jaccard": pa.array(jaccard, mask=duplicate_of < 0),
        "cluster": pa.array(cluster, mask=cluster < 0),
        "cluster_size": cluster_size,
        "pairs": pa.ListArray.from_arrays(pair_offsets.astype(np.int32), pairs),
    }
    write_labels(job.shard, NearStage, rows, labels)


def _get_sets_path(scratch: Path, shard_name: str) -> Path:
    """Returns the file with the sets of a shard's members, end to end: uint64. Beside
    it is where each begins, and where the last ends (.arrow)."""
    return scratch / "sets" / f"{shard_name}.hashes"


def _get_copy_marks_path(scratch: Path, shard_name: str) -> Path:
    """Returns the file that says which of a shard's members are copies of others."""
    return get_shard_path(scratch, "marks", shard_name)


@dataclass(frozen=True)
class _ShardHashes:
    """What the search needs of a shard's members; all but the sets themselves, which
    are written as they are made."""

    groups: list[SelectedRows]
    """The members without their texts."""
    set_sizes: np.ndarray
    """N-grams of each: int64 [members]; 0: it has no words."""
    digests: bytearray
    """Each set's SHA-256, the first 128 bits of it."""
    band_keys: np.ndarray
    """uint64 [bands, members]."""
    ranks: np.ndarray
    """float64 [members], the higher the better."""


def _hash_shard(stage: NearStage, scratch: Path, shard: StageShardView) -> None:
    """Writes a shard's members, their sets of n-grams, the digests of these, and a key
    for each band of their signatures."""
    if get_shard_path(scratch, "members", shard.name).exists():  # It is written last.
        return
    sets_path = _get_sets_path(scratch, shard.name)
    with convert_write_errors(sets_path):
        sets_path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(sets_path) as new, new.open("wb") as stream:
        hashes = _hash_members(stage, shard, stream)
    set_starts = np.cumsum([0, *hashes.set_sizes], dtype=np.int64)
    write_columns(sets_path.with_suffix(".arrow"), {"start": set_starts})

    # Members without words are like none, and copies of none.
    has_words = hashes.set_sizes > 0
    write_band_keys(scratch, shard.name, hashes.band_keys, has_words)
    digest_columns = sort_digests(
        hashes.digests, hashes.ranks, np.flatnonzero(has_words)
    )
    write_columns(get_shard_path(scratch, "digests", shard.name), digest_columns)
    write_members(scratch, shard.name, hashes.groups, stage.keep_by)


def _hash_members(
    stage: NearStage, shard: StageShardView, sets_stream: BinaryIO
) -> _ShardHashes:
    """Hashes a shard's members, a row group at a time, and writes their sets."""
    banding = stage.banding
    groups = []
    set_sizes = []
    digests = bytearray()
    # Empty ones first: a shard may have no members.
    band_keys = [np.empty((banding.num_bands, 0), np.uint64)]
    ranks = [np.empty(0)]
    for group in shard.read_selected_rows(("id", *stage.input_columns)):
        texts = group.batch.column("text").to_pylist()
        sets = [make_shingle_set(text, stage.ngram) for text in texts]
        for shingles in sets:
            sets_stream.write(shingles.data)
            set_sizes.append(len(shingles))
            digests += hashlib.sha256(shingles.data).digest()[:16]
        band_keys.append(compute_band_keys(sets, banding))
        ranks.append(compute_keep_scores(group.batch, stage.keep_by))
        groups.append(replace(group, batch=group.batch.drop_columns(["text"])))
    return _ShardHashes(
        groups=groups,
        set_sizes=np.array(set_sizes, np.int64),
        digests=digests,
        band_keys=np.concatenate(band_keys, axis=1),
        ranks=np.concatenate(ranks),
    )


def _write_candidates(
    stage: NearStage,
    members: SelectedDocuments,
    folder: Path,
    num_ranges: int,
    band_and_range: tuple[int, int],
) -> None:
    """Writes the candidates of a band and range in files of bounded size, each
    sorted."""
    band, range_index = band_and_range
    done = folder / f"{band}-{range_index}.done"
    if done.exists():
        return
    copy_marks = [_get_copy_marks_path(members.folder, name) for name in members.shards]
    candidates = find_candidate_pairs(
        members, band, num_ranges, range_index, stage.max_group, copy_marks
    )
    max_pairs = stage.memory // _PAIR_JOB_BYTES
    for number, pieces in enumerate(batch_by_size(candidates, len, max_pairs)):
        path = folder / f"pairs-{band}-{range_index}-{number}.arrow"
        write_columns(path, {"pair": np.unique(np.concatenate(pieces))})
    # The files of pairs may be any number, so another one says that all are there.
    write_columns(done, {})


def _verify(
    min_jaccard: float,
    members: SelectedDocuments,
    candidate_files: Sequence[Path],
    range_starts: np.ndarray,
    part: tuple[int, Path],
) -> None:
    """Writes the candidates of a range of pairs whose Jaccard similarity is
    `min_jaccard` or more. `part`: the range's index, and the file to write."""
    range_index, path = part
    if path.exists():
        return
    columns, _ = read_range(candidate_files, ("pair",), range_starts, range_index)
    # Several bands may have the same pair.
    candidates = np.unique(columns["pair"])
    low, high = unpack_pairs(candidates)
    jaccard = _compute_jaccard(members, low, high)
    is_alike = jaccard >= min_jaccard
    write_columns(path, {"pair": candidates[is_alike], "jaccard": jaccard[is_alike]})


def _compute_jaccard(
    members: SelectedDocuments, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Computes the Jaccard similarity of pairs of members, sorted by `low`, from their
    sets of n-grams: float64 [pairs]."""
    jaccard = np.empty(len(low))
    # By the shards of both members, so that two files of sets are open at a time.
    for low_shard, span in members.group_by_shard(low):
        # Pairs whose smaller member is in this shard, sorted by the larger one.
        by_high = span.start + np.argsort(high[span], kind="stable")
        for high_shard, high_span in members.group_by_shard(high[by_high]):
            pairs = by_high[high_span]
            low_sets = _read_sets(members, low_shard, low[pairs])
            high_sets = _read_sets(members, high_shard, high[pairs])
            for pair, one, other in zip(pairs, low_sets, high_sets, strict=True):
                num_shared = len(np.intersect1d(one, other, assume_unique=True))
                num_all = len(one) + len(other) - num_shared
                jaccard[pair] = num_shared / num_all
    return jaccard


def _read_sets(
    members: SelectedDocuments, shard_index: int, numbers: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields the sets of some members of a shard, by their numbers. They have n-grams,
    so that the mapped file is not empty."""
    path = _get_sets_path(members.folder, members.shards[shard_index])
    hashes = np.memmap(path, np.uint64, "r")
    starts = read_columns(path.with_suffix(".arrow"))["start"]
    places = numbers - members.shard_offsets[shard_index]
    for place in places.tolist():
        yield hashes[starts[place] : starts[place + 1]]
