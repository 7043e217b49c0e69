"""Near-duplicates: documents that share most of what they say."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.dedup.columns import open_columns, write_columns
from maxlm.corpus.dedup.components import DuplicateMarks, resolve_duplicates
from maxlm.corpus.dedup.members import Members, write_labels
from maxlm.corpus.dedup.minhash import choose_banding
from maxlm.corpus.dedup.search import NearSearch, find_alike
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CorpusStage, JobRunner
from maxlm.corpus.text import UNICODE

_SHOWN = 3  # Clusters and documents that an alarm names.


class NearStage(CorpusStage):
    """Documents whose sets of word n-grams overlap: Jaccard similarity >= `jaccard`.

    MinHash signatures in bands (`dedup.minhash`) give candidates and nothing else: each pair is
    verified by the exact Jaccard similarity of the two sets of n-grams before it counts. From the
    best document of a cluster to the worst, one is marked if it is like a document that is kept
    (`dedup.components`), so each marked document is verified against the one it is `of`, and
    chains of likeness delete nothing.

    Words are compared without case, accents and punctuation; in scripts without spaces each letter
    is a word (`maxlm.corpus.text`). A document of fewer words than an n-gram is one n-gram; one
    without words is like no other.
    """

    stage: Literal["near"] = "near"
    jaccard: float = Field(default=0.8, gt=0, le=1)
    """Documents are near-duplicates from this similarity on."""
    recall: float = Field(default=0.99, gt=0, lt=1)
    """The share of pairs of exactly that similarity that is to be found; of more similar pairs
    more are. A higher value costs time and scratch disk: see `hashes`."""
    ngram: int = Field(default=5, ge=1, le=100)
    """Words in an n-gram (shingle)."""
    hashes: int = Field(default=256, ge=1, le=4096)
    """Hash functions at most. More of them make fewer false candidates to verify, for more time a
    document; at 0.8 and 0.99 the default gives 26 bands of 8."""
    max_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops if a source would lose more than this share of the documents looked at. This
    and the next two are looked at when the stage runs, so changing them does nothing to one that
    is done; after a stop, the run goes on from what it has found."""
    max_shares: Mapping[str, float] = {}
    """Limits of single sources by name, instead of `max_share`."""
    alarm_from: int = Field(default=100, ge=1)
    """Sources of fewer documents may lose any share."""
    max_group: int = Field(default=50, ge=4)
    """Documents with a band in common are all compared with each other up to this number; in a
    larger group each with a quarter of this number of the best and with as many of the documents
    that follow it, so that boilerplate costs no quadratic time. A pair that this misses in one band
    is mostly found in another, where it shares something rarer than the boilerplate."""
    version: ClassVar[int] = 4
    verdicts: ClassVar[tuple[str, ...]] = ("duplicate", "jaccard")
    neutral = (*CorpusStage.neutral, "max_share", "max_shares", "alarm_from")

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources that its settings name."""
        return tuple(self.max_shares)

    def schema(self) -> pa.Schema:
        return pa.schema(
            [
                ("duplicate", pa.bool_()),
                ("of", pa.large_string()),  # the kept document; large: no category to be counted
                ("jaccard", pa.float64()),  # with `of`
                ("cluster", pa.int64()),  # null: like no other
                ("cluster_size", pa.int64()),
            ]
        )

    def search(self) -> NearSearch:
        """Makes the search, with the bands and rows that the settings come to."""
        banding = choose_banding(self.jaccard, self.recall, self.hashes)
        return NearSearch(
            self.jaccard, self.ngram, banding, self.max_group,
            self.reads, self.keep_by, self.memory,
        )  # fmt: skip

    def key(self) -> str:
        return f"{super().key()} {UNICODE}"

    def packages(self) -> tuple[str, ...]:
        return ("regex", "scipy")

    def label(self, shards: Sequence[StageShardView], scratch: Path, run: JobRunner) -> None:
        """See `CorpusStage.label`; the steps are those of `dedup.search`.

        Raises:
            MaxlmError: a source would lose more than it may.
        """
        members, alike = find_alike(self.search(), shards, scratch, run)
        marks = resolve_duplicates(alike, lambda number: members.take("rank", number).to_numpy())
        write_columns(scratch / "marks.arrow", vars(marks))
        parts = list(enumerate(shards))
        counts = run(partial(_count_sources, members), parts, "count")
        if shards:
            self._check_shares(members, marks, counts, shards[0].folder)
            ends = {name: members.documents(getattr(alike, name)) for name in ("low", "high")}
            path = shards[0].path(self.title).with_name("pairs.arrow")
            write_columns(path, ends | {"jaccard": alike.jaccard})
        run(partial(_label_shard, members, self.schema()), parts, "label")

    def _check_shares(
        self,
        members: Members,
        marks: DuplicateMarks,
        counts: Sequence[tuple[Counter, Counter]],
        corpus: Path,
    ) -> None:
        documents = sum((each for each, _ in counts), Counter())
        lost = sum((each for _, each in counts), Counter())
        for source in sorted(lost, key=str):
            share = lost[source] / documents[source]
            most = self.max_shares.get(source, self.max_share)
            if share > most and documents[source] >= self.alarm_from:
                raise MaxlmError(
                    f'source "{source}" would lose {lost[source]} of {documents[source]} documents'
                    f" ({share:.1%}; allowed: {most:.1%}). {_largest(members, marks, source)}",
                    where=self.title,
                    fix=f"look at these documents (maxlm corpus show {corpus} ID): if they are to "
                    f"go, set max_shares: {{{source}: {min(1.0, share + 0.01):.2f}}}; if not, "
                    "raise jaccard or leave them out by where",
                )


def _largest(members: Members, marks: DuplicateMarks, source: str) -> str:
    """A sentence about the clusters in which a source would lose most."""
    lost = np.flatnonzero(marks.of >= 0)
    sources = members.take("source", marks.member[lost]).to_numpy(zero_copy_only=False)
    lost = lost[sources == source]
    cluster, counts = np.unique(marks.cluster[lost], return_counts=True)
    told = []
    for which in np.argsort(-counts, kind="stable")[:_SHOWN]:
        here = lost[marks.cluster[lost] == cluster[which]][:_SHOWN]
        ids = members.take("id", marks.member[here]).to_pylist()
        kept = members.take("id", marks.of[here[:1]])[0]
        more = ", ..." if counts[which] > len(ids) else ""
        told.append(f"{counts[which]} like {kept} ({', '.join(ids)}{more})")
    return f"Largest clusters: {'; '.join(told)}"


def _read_marks(members: Members, number: int) -> DuplicateMarks:
    """Reads the marks of a shard's members."""
    with open_columns(members.folder / "marks.arrow") as columns:
        part = slice(*np.searchsorted(columns["member"], members.first[number : number + 2]))
        names = DuplicateMarks.__dataclass_fields__
        return DuplicateMarks(*(columns[name][part] for name in names))


def _count_sources(members: Members, part: tuple[int, StageShardView]) -> tuple[Counter, Counter]:
    """Documents of each source, and those of them that are marked."""
    marks = _read_marks(members, part[0])
    marked = marks.member[marks.of >= 0] - members.first[part[0]]
    with open_columns(members.file(part[0])) as columns:
        sources = columns.array("source")
        return Counter(sources.to_pylist()), Counter(sources.take(pa.array(marked)).to_pylist())


def _label_shard(members: Members, schema: pa.Schema, part: tuple[int, StageShardView]) -> None:
    number, shard = part
    marks = _read_marks(members, number)
    with open_columns(members.file(number)) as columns:
        rows = columns["row"]
    mark = np.full(len(rows), -1, np.int64)  # Of each member: its mark.
    mark[marks.member - members.first[number]] = np.arange(len(marks.member))
    clustered = pa.array(mark, mask=mark < 0)
    of = pa.array(marks.of, mask=marks.of < 0).take(clustered)
    lost = pa.array(np.cumsum(of.is_valid()) - 1, mask=of.is_null().to_numpy(False))
    labels = {
        "duplicate": of.is_valid(),
        "of": members.take("id", of.drop_null().to_numpy()).cast(pa.large_string()).take(lost),
        "jaccard": pa.array(marks.jaccard, mask=marks.of < 0).take(clustered),
        "cluster": pa.array(marks.cluster).take(clustered),
        "cluster_size": pc.fill_null(pa.array(marks.size).take(clustered), 1),
    }
    write_labels(shard, schema, rows, labels)
