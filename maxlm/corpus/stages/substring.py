"""Substring deduplication: passages that a corpus has more than once."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from maxlm.corpus.cuts import CUTS
from maxlm.corpus.dedup.members import write_labels
from maxlm.corpus.dedup.substrings import (
    REPEATS,
    find_cuts,
    list_blocks,
    match_range,
    write_shard_blocks,
)
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CorpusStage, JobRunner
from maxlm.corpus.text import UNICODE

_BYTES_OF_CHARACTER = 64  # Of its block, in an index job.
_BYTES_OF_WINDOW = 64  # In a range job.
_LARGEST_BLOCK = 2**31  # Places in a block are uint32, and no document is longer than this.


class SubstringStage(CorpusStage):
    """Passages of at least `min_tokens` words that stand elsewhere too, within a document or in
    another, become spans to cut; the first copy stays (Lee et al. 2022, arXiv 2107.06499).

    A word is what white space separates, and in scripts without spaces each letter with its marks
    (see `maxlm.corpus.text`), so spans begin and end between words; passages are the same if
    their characters are, white space included. `dedup.substrings` states the rule and its
    guarantees. No document is split, so one of more characters than `memory` / 64 takes more.
    What is cut is settled among the documents that the rules keep; `where` saves time by leaving
    out those that they drop.
    """

    stage: Literal["substring"] = "substring"
    min_tokens: int = Field(default=50, ge=2)
    """The shortest repeat to be cut, in words; shorter ones (set phrases, addresses) stay. 50 words
    of English are about 65 tokens of byte-pair encoding, of which the paper takes 50."""

    version: ClassVar[int] = 4
    verdicts: ClassVar[tuple[str, ...]] = ("cuts", "cut_share")

    def schema(self) -> pa.Schema:
        return pa.schema([("cuts", CUTS), ("cut_share", pa.float64()), ("repeats", REPEATS)])

    def key(self) -> str:
        return f"{super().key()} {UNICODE}"

    def packages(self) -> tuple[str, ...]:
        return ()

    def label(self, shards: Sequence[StageShardView], scratch: Path, run: JobRunner) -> None:
        """See `CorpusStage.label`. The scratch files take eight times the text.

        Raises:
            MaxlmError: a document of 2^31 characters or more.
        """
        folder = scratch / f"windows-{self.memory}"  # A killed run may have had another.
        largest = min(self.memory // _BYTES_OF_CHARACTER, _LARGEST_BLOCK)
        index = partial(write_shard_blocks, folder, self.min_tokens, largest, self.keep_by)
        run(index, shards, "index")
        windows = list_blocks(folder, shards)
        number = max(1, -(-windows * _BYTES_OF_WINDOW // self.memory))
        match = partial(match_range, folder, number, self.keep_by is not None)
        run(match, range(number), "match")
        run(partial(_cut, self, folder, number), shards, "cut")


def _cut(stage: SubstringStage, folder: Path, number: int, shard: StageShardView) -> None:
    found = find_cuts(folder, shard.name, number, stage.min_tokens)
    labels = {name: found.column(name) for name in stage.schema().names}
    write_labels(shard, stage.schema(), found.column("row").to_numpy(), labels)
