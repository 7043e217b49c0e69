"""Substring deduplication: passages that a corpus has more than once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from maxlm.corpus.characters import UNICODE
from maxlm.corpus.cuts import CUTS
from maxlm.corpus.dedup.members import write_labels
from maxlm.corpus.dedup.steps import Steps
from maxlm.corpus.dedup.substrings import (
    REPEATS,
    find_cuts,
    index_shard,
    list_blocks,
    match_range,
)
from maxlm.corpus.shards import Shard
from maxlm.corpus.stage import CorpusStage
from maxlm.runtime.executor import Executor
from maxlm.runtime.progress import Progress

_BYTES_OF_TEXT = 16  # What an index job needs for a byte of its block: of English 10.
_BYTES_OF_WINDOW = 64  # What a range job needs for a window.
_LARGEST_BLOCK = 2**31  # Places in a block are uint32, and no document is longer than this.


class SubstringStage(CorpusStage):
    """Passages of at least `min_tokens` words that stand elsewhere too, within a document or in
    another, become spans to cut; the first copy stays (Lee et al. 2022, arXiv 2107.06499).

    A word is what white space separates, and in scripts without spaces each letter with its marks
    (see `maxlm.corpus.characters`), so spans begin and end between words; passages are the
    same if their bytes are, white space included. `dedup.substrings` states the rule and what it
    guarantees. No document is split, so one that is longer than a sixteenth of `memory` takes more.
    What is cut is settled among the documents that the rules keep; `where` saves time by leaving
    out those that they drop.
    """

    stage: Literal["substring"] = "substring"
    min_tokens: int = Field(default=50, ge=2)
    """The shortest repeat to be cut, in words; shorter ones (set phrases, addresses) stay. 50 words
    of English are about 65 tokens of byte-pair encoding, of which the paper takes 50."""

    version: ClassVar[int] = 3
    verdicts: ClassVar[tuple[str, ...]] = ("cuts", "cut_share")

    def schema(self) -> pa.Schema:
        return pa.schema([("cuts", CUTS), ("cut_share", pa.float64()), ("repeats", REPEATS)])

    def key(self) -> str:
        return f"{super().key()} {UNICODE}"

    def packages(self) -> tuple[str, ...]:
        return ("numba",)

    def label(
        self, shards: Sequence[Shard], scratch: Path, engine: Executor, progress: Progress
    ) -> None:
        """See `CorpusStage.label`. The scratch files take three times the text.

        Raises:
            MaxlmError: a document of 2 GiB or more.
        """
        folder = scratch / str(self.memory)  # A killed run may have had another.
        steps = Steps(self.title, engine, progress)
        steps.run("index", _index, [_IndexJob(self, folder, shard) for shard in shards])
        windows = list_blocks(folder, shards)
        number = max(1, -(-windows * _BYTES_OF_WINDOW // self.memory))
        steps.run("match", _match, [_RangeJob(self, folder, number, i) for i in range(number)])
        steps.run("cut", _cut, [_CutJob(self, folder, number, shard) for shard in shards])


@dataclass(frozen=True)
class _IndexJob:
    stage: SubstringStage
    folder: Path
    shard: Shard


def _index(job: _IndexJob) -> None:
    stage = job.stage
    block_bytes = min(stage.memory // _BYTES_OF_TEXT, _LARGEST_BLOCK)
    index_shard(job.folder, job.shard, stage.min_tokens, block_bytes, stage.keep_by)


@dataclass(frozen=True)
class _RangeJob:
    stage: SubstringStage
    folder: Path
    number: int
    which: int


def _match(job: _RangeJob) -> None:
    match_range(job.folder, job.number, job.which, job.stage.keep_by is not None)


@dataclass(frozen=True)
class _CutJob:
    stage: SubstringStage
    folder: Path
    number: int
    shard: Shard


def _cut(job: _CutJob) -> None:
    stage = job.stage
    found = find_cuts(job.folder, job.shard.name, job.number, stage.min_tokens)
    rows = found.column("row").to_numpy()
    labels = {name: found.column(name) for name in stage.schema().names}
    write_labels(job.shard, stage.schema(), rows, labels)
