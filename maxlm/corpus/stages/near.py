"""Near-duplicates: documents that share most of what they say.

The search goes by jobs over shards and over ranges of hashes:

1. Each shard: each member's set of n-grams, and a key for each band of its signature.
2. Each range of digests of sets: members with equal sets, which are copies. Only the
   best of them goes on, so a text that is there a thousand times costs a thousand
   pairs, and no more.
3. Each band and range of its keys: pairs of members with the same key, the candidates.
4. Each range of pairs: the exact similarity of its candidates.

A job whose files are there is not done again, so a killed run goes on where it stopped.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from maxlm.corpus.dedup.columns import (
    get_shard_path,
    read_columns,
    read_range,
    write_columns,
)
from maxlm.corpus.dedup.copies import read_copies, write_copies
from maxlm.corpus.dedup.members import (
    SelectedDocuments,
    compute_keep_scores,
    open_selected_documents,
    write_labels,
    write_members,
)
from maxlm.corpus.dedup.minhash import (
    choose_banding,
    compute_band_keys,
    make_shingle_set,
)
from maxlm.corpus.dedup.pairs import (
    count_pairs,
    find_candidate_pairs,
    find_pair_range_starts,
    resolve_duplicates,
    unpack_pairs,
    write_band_keys,
)
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CrossDocumentStage, JobRunner, LabelTypes, Verdicts
from maxlm.data.batching import batch_by_size
from maxlm.runtime.files import convert_write_errors, replace_file

_DIGEST_BYTES = 256  # A member's share of the memory of a job that sorts digests.
_KEY_BYTES = 64  # A member's share of the memory of a job that sorts keys.
_PAIR_BYTES = 64  # A pair's, where pairs are sorted or verified.
PAIRS = pa.list_(pa.struct([("document", pa.int64()), ("jaccard", pa.float64())]))
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
        "pairs": PAIRS,  # documents before this one in the corpus that are like it
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

    def choose_banding(self) -> tuple[int, int]:
        """Chooses the bands, and the rows of each, that the settings come to."""
        return choose_banding(self.jaccard, self.recall, self.hashes)

    def label(
        self, shards: Sequence[StageShardView], scratch: Path, run_jobs: JobRunner
    ) -> None:
        """See `CrossDocumentStage.label`. This process holds 24 bytes for each pair
        found."""
        run_jobs(partial(_sign_shard, self, scratch), shards, "signatures")
        members = open_selected_documents(scratch, shards)
        copies, sources = self._find_copies(members, run_jobs)
        number = max(1, -(-members.num_selected * _KEY_BYTES // self.memory))
        folder = scratch / f"keys-{number}"  # A killed run may have had other ranges.
        num_bands, _ = self.choose_banding()
        parts = list(product(range(1, num_bands + 1), range(number)))
        run_jobs(
            partial(_write_pairs, self, members, folder, number), parts, "candidates"
        )

        found = sorted(folder.glob("pairs-*.arrow"))
        number = max(1, -(-count_pairs(found) * _PAIR_BYTES // self.memory))
        starts = find_pair_range_starts(found, number)
        files = [folder / f"checked-{number}-{i}.arrow" for i in range(number)]
        verify = partial(_verify, self.jaccard, members, found, starts)
        run_jobs(verify, list(enumerate(files)), "verify")

        verified = [read_columns(file) for file in files]
        low, high = unpack_pairs(np.concatenate([each["pair"] for each in verified]))
        jaccard = np.concatenate([each["jaccard"] for each in verified])
        low = np.concatenate([low, np.minimum(copies, sources)])
        high = np.concatenate([high, np.maximum(copies, sources)])
        jaccard = np.concatenate([jaccard, np.ones(len(copies))])
        rank_fn = lambda number: members.take("rank", number).to_numpy()  # noqa: E731
        marks = resolve_duplicates(low, high, jaccard, rank_fn)
        ends = np.searchsorted(marks.member, members.shard_offsets)
        pairs = _list_pairs_by_shard(members, low, high, jaccard)
        parts = [
            (i, shard, marks[ends[i] : ends[i + 1]], pairs[i])
            for i, shard in enumerate(shards)
        ]
        run_jobs(partial(_label_shard, members), parts, "label")

    def _find_copies(
        self, members: SelectedDocuments, run_jobs: JobRunner
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds members whose sets of n-grams others have, and the best member with
        each: int64 [copies] both. Writes down which are such copies, for the search of
        candidates."""
        number = max(1, -(-members.num_selected * _DIGEST_BYTES // self.memory))
        digests = [
            get_shard_path(members.folder, "digests", name) for name in members.shards
        ]
        group = partial(write_copies, members.folder, digests, number, True)
        run_jobs(group, range(number), "copies")
        offsets = np.array(members.shard_offsets)
        copies = [np.empty(0, np.int64)]
        sources = [np.empty(0, np.int64)]
        for shard, name in enumerate(members.shards):
            columns = read_copies(members.folder, number, shard)
            member = columns["place"] + offsets[shard]
            source = offsets[columns["source_file"]] + columns["source_place"]
            others = member != source
            copies.append(member[others])
            sources.append(source[others])
            is_copy = np.zeros(offsets[shard + 1] - offsets[shard], np.uint8)
            is_copy[columns["place"][others]] = 1
            write_columns(
                get_shard_path(members.folder, "marks", name), {"is_copy": is_copy}
            )
        return np.concatenate(copies), np.concatenate(sources)


def _list_pairs_by_shard(
    members: SelectedDocuments, low: np.ndarray, high: np.ndarray, jaccard: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Lists the pairs of each shard's members with members before them: how many each
    has, the other's number among all documents, and how alike they are."""
    order = np.lexsort((low, high))
    high = high[order]
    documents = members.get_document_numbers(low[order])
    jaccard = jaccard[order]
    parts = []
    for shard in range(len(members.shards)):
        first, stop = members.shard_offsets[shard : shard + 2]
        begin, end = np.searchsorted(high, [first, stop])
        counts = np.bincount(high[begin:end] - first, minlength=stop - first)
        parts.append((counts, documents[begin:end], jaccard[begin:end]))
    return parts


def _label_shard(
    members: SelectedDocuments,
    part: tuple[int, StageShardView, Any, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    """Write the labels of a shard, whose index, clustered members and pairs `part`
    has."""
    number, shard, marks, (pair_counts, pair_documents, pair_jaccard) = part
    pair_fields = list(PAIRS.value_type)
    pairs = pa.StructArray.from_arrays(
        [pa.array(pair_documents), pa.array(pair_jaccard)], fields=pair_fields
    )
    pair_offsets = np.concatenate([[0], np.cumsum(pair_counts)]).astype(np.int32)
    rows = members.read_batch(number).column("row").to_numpy()
    of, cluster = np.full((2, len(rows)), -1, np.int64)
    jaccard = np.zeros(len(rows))
    cluster_size = np.ones(len(rows), np.int64)
    places = marks.member - members.shard_offsets[number]
    of[places], jaccard[places] = marks.duplicate_of, marks.jaccard
    cluster[places], cluster_size[places] = marks.cluster, marks.cluster_size
    labels = {
        "duplicate": of >= 0,
        "of": members.take("id", of),
        "jaccard": pa.array(jaccard, mask=of < 0),
        "cluster": pa.array(cluster, mask=cluster < 0),
        "cluster_size": cluster_size,
        "pairs": pa.ListArray.from_arrays(pair_offsets, pairs),
    }
    write_labels(shard, NearStage, rows, labels)


def _set_file(scratch: Path, shard: str) -> Path:
    """The sets of a shard's members, end to end; beside it where each begins
    (.arrow)."""
    return scratch / "sets" / f"{shard}.hashes"


def _sign_shard(stage: NearStage, scratch: Path, shard: StageShardView) -> None:
    file = _set_file(scratch, shard.name)
    if get_shard_path(scratch, "members", shard.name).exists():  # It is written last.
        return
    members = []
    sizes = []
    banding = stage.choose_banding()
    digests = bytearray()
    keys = [np.empty((banding[0], 0), np.uint64)]
    with convert_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(file) as new, new.open("wb") as stream:
        for group in shard.read_selected_rows(("id", *stage.input_columns)):
            texts = group.batch.column("text").to_pylist()
            sets = [make_shingle_set(text, stage.ngram) for text in texts]
            stream.writelines(each.data for each in sets)
            sizes += map(len, sets)
            for shingles in sets:
                digests += hashlib.sha256(shingles.data).digest()[:16]
            keys.append(compute_band_keys(sets, banding))
            members.append(replace(group, batch=group.batch.drop_columns(["text"])))
    write_columns(
        file.with_suffix(".arrow"), {"start": np.cumsum([0, *sizes], dtype=np.int64)}
    )
    write_band_keys(
        scratch, shard.name, np.concatenate(keys, axis=1), np.array(sizes, bool)
    )
    hashes, checks = np.frombuffer(digests, np.uint64).reshape(-1, 2).T
    has_words = np.flatnonzero(sizes)
    order = has_words[np.argsort(hashes[has_words], kind="stable")]
    ranks = [compute_keep_scores(group.batch, stage.keep_by) for group in members]
    rank = np.concatenate([np.empty(0), *ranks])[order]
    columns = {
        "hash": hashes[order],
        "check": checks[order],
        "place": order.astype(np.uint32),
    }
    write_columns(
        get_shard_path(scratch, "digests", shard.name), columns | {"rank": rank}
    )
    write_members(scratch, shard.name, members, stage.keep_by)


def _write_pairs(
    stage: NearStage,
    members: SelectedDocuments,
    folder: Path,
    number: int,
    part: tuple[int, int],
) -> None:
    """Write the candidates of a band and range in files of bounded size, each
    sorted."""
    band, which = part
    done = folder / f"{band}-{which}.done"
    if done.exists():
        return
    marks = [get_shard_path(members.folder, "marks", name) for name in members.shards]
    found = find_candidate_pairs(members, band, number, which, stage.max_group, marks)
    for i, pieces in enumerate(batch_by_size(found, len, stage.memory // _PAIR_BYTES)):
        path = folder / f"pairs-{band}-{which}-{i}.arrow"
        write_columns(path, {"pair": np.unique(np.concatenate(pieces))})
    write_columns(done, {})


def _verify(
    least: float,
    members: SelectedDocuments,
    found: Sequence[Path],
    starts: np.ndarray,
    part: tuple[int, Path],
) -> None:
    """Write the candidates of a range of pairs whose Jaccard similarity is `least` or
    more."""
    which, out = part
    if out.exists():
        return
    columns, _ = read_range(found, ("pair",), starts, which)
    candidates = np.unique(columns["pair"])
    low, high = unpack_pairs(candidates)
    jaccard = np.empty(len(candidates))
    for shard, here in members.group_by_shard(low):
        order = np.argsort(high[here], kind="stable") + here.start
        for other, there in members.group_by_shard(high[order]):
            pairs = order[there]
            ones = _read_sets(members, shard, low[pairs])
            others = _read_sets(members, other, high[pairs])
            for pair, one, its in zip(pairs, ones, others, strict=True):
                shared = len(np.intersect1d(one, its, assume_unique=True))
                jaccard[pair] = shared / (len(one) + len(its) - shared)
    alike = jaccard >= least
    write_columns(out, {"pair": candidates[alike], "jaccard": jaccard[alike]})


def _read_sets(
    members: SelectedDocuments, shard: int, which: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields the sets of members of a shard, which have n-grams: no file is empty."""
    file = _set_file(members.folder, members.shards[shard])
    hashes = np.memmap(file, np.uint64, "r")
    start = read_columns(file.with_suffix(".arrow"))["start"]
    for place in (which - members.shard_offsets[shard]).tolist():
        yield hashes[start[place] : start[place + 1]]
