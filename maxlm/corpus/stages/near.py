"""Near-duplicates: documents that share most of what they say."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from maxlm.config import MaxlmError
from maxlm.corpus.characters import UNICODE
from maxlm.corpus.dedup.columns import open_columns, write_columns
from maxlm.corpus.dedup.components import DuplicateMarks, resolve_duplicates, separate_exact_copies
from maxlm.corpus.dedup.members import Members, write_labels
from maxlm.corpus.dedup.minhash import choose_banding
from maxlm.corpus.dedup.search import NearSearch, find_alike
from maxlm.corpus.dedup.steps import StepRunner
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CorpusStage
from maxlm.runtime.executor import Executor
from maxlm.runtime.progress import Progress

_SHOWN = 3  # Clusters and documents that an alarm names.


class NearStage(CorpusStage):
    """Documents whose sets of word n-grams overlap: Jaccard similarity >= `jaccard`.

    MinHash signatures in bands (`dedup.minhash`) give candidates and nothing else: each pair is
    verified by the exact Jaccard similarity of the two sets of n-grams before it counts. From the
    best document of a cluster to the worst, one is marked if it is like a document that is kept
    (`dedup.components`), so each marked document is verified against the one it is `of`, and
    chains of likeness delete nothing.

    Words are compared without case, accents and punctuation; in scripts without spaces each letter
    is a word (`maxlm.corpus.tokens`). A document of fewer words than an n-gram is one n-gram; one
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

    def label(
        self, shards: Sequence[StageShardView], scratch: Path, engine: Executor, progress: Progress
    ) -> None:
        """See `CorpusStage.label`; the steps are those of `dedup.search`.

        Raises:
            MaxlmError: a source would lose more than it may.
        """
        steps = StepRunner(self.title, engine, progress)
        found = find_alike(self.search(), shards, scratch, steps)
        members = found.members
        alike = separate_exact_copies(found.pairs, found.jaccard, found.copies)
        marks = resolve_duplicates(alike, lambda number: members.take("rank", number).to_numpy())
        write_columns(scratch / "marks.arrow", vars(marks))
        jobs = [_LabelJob(self, shard, members, i) for i, shard in enumerate(shards)]
        counts = steps.run("count", _count_sources, jobs)
        if shards:
            self._check_shares(members, marks, counts, shards[0].folder)
            ends = (members.documents(each) for each in (alike.low, alike.high))
            columns = dict(zip(("low", "high"), ends, strict=True)) | {"jaccard": alike.jaccard}
            write_columns(shards[0].path(self.title).with_name("pairs.arrow"), columns)
            ends = {name: members.documents(getattr(alike, name)) for name in ("copy", "best")}
            write_columns(shards[0].path(self.title).with_name("copies.arrow"), ends)
        steps.run("label", _label_shard, jobs)

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
            share, most = lost[source] / documents[source], self._most(source)
            if share > most and documents[source] >= self.alarm_from:
                raise MaxlmError(
                    f'source "{source}" would lose {lost[source]} of {documents[source]} documents'
                    f" ({share:.1%}; allowed: {most:.1%}). {_largest(members, marks, source)}",
                    where=self.title,
                    fix=f"look at these documents (maxlm corpus show {corpus} ID): if they are to "
                    f"go, set max_shares: {{{source}: {min(1.0, share + 0.01):.2f}}}; if not, "
                    "raise jaccard or leave them out by where",
                )

    def _most(self, source: str) -> float:
        return self.max_shares.get(source, self.max_share)


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


@dataclass(frozen=True)
class _LabelJob:
    stage: NearStage
    shard: StageShardView
    members: Members
    which: int

    def marks(self) -> DuplicateMarks:
        """The marks of this shard's members."""
        with open_columns(self.members.folder / "marks.arrow") as columns:
            ends = self.members.first[self.which : self.which + 2]
            part = slice(*np.searchsorted(columns["member"], ends))
            return DuplicateMarks(
                *(columns[name][part] for name in DuplicateMarks.__dataclass_fields__)
            )


def _count_sources(job: _LabelJob) -> tuple[Counter, Counter]:
    """Documents of each source, and those of them that are marked."""
    marks = job.marks()
    marked = marks.member[marks.of >= 0] - job.members.first[job.which]
    with open_columns(job.members.file(job.which)) as columns:
        sources = columns.array("source")
        return Counter(sources.to_pylist()), Counter(sources.take(pa.array(marked)).to_pylist())


def _label_shard(job: _LabelJob) -> None:
    marks, members = job.marks(), job.members
    with open_columns(members.file(job.which)) as columns:
        rows = columns["row"]
    mark = np.full(len(rows), -1, np.int64)  # Of each member: its mark.
    mark[marks.member - members.first[job.which]] = np.arange(len(marks.member))
    clustered = pa.array(mark, mask=mark < 0)
    of = pa.array(marks.of, mask=marks.of < 0).take(clustered)
    lost = pa.array(np.cumsum(of.is_valid()) - 1, mask=of.is_null().to_numpy(False))
    jaccard = pa.array(marks.jaccard, mask=marks.of < 0).take(clustered)
    labels = {
        "duplicate": of.is_valid(),
        "of": members.take("id", of.drop_null().to_numpy()).cast(pa.large_string()).take(lost),
        "jaccard": jaccard,
        "cluster": pa.array(marks.cluster).take(clustered),
        "cluster_size": pc.fill_null(pa.array(marks.size).take(clustered), 1),
    }
    write_labels(job.shard, job.stage.schema(), rows, labels)
