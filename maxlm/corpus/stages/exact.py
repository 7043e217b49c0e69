"""Exact deduplication: documents whose normalised texts are the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from maxlm.config import LocalPath
from maxlm.corpus.dedup.columns import (
    count_ranges,
    get_shard_path,
    read_columns,
    write_columns,
)
from maxlm.corpus.dedup.copies import read_copies, sort_digests, write_copies
from maxlm.corpus.dedup.members import (
    SelectedDocuments,
    open_selected_documents,
    write_labels,
    write_members,
)
from maxlm.corpus.dedup.text_index import (
    DIGEST,
    mark_indexed_texts,
    reserve_index_entry,
)
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CrossDocumentStage, JobRunner, LabelTypes, Verdicts
from maxlm.corpus.text import normalize_unicode

_MEMBER_BYTES = 256  # A member's share of a range job's memory, with its sorted copies.


class ExactStage(CrossDocumentStage):
    """Documents with the same SHA-256 of their normalised text (128 bits of it) are
    copies; the best is kept.

    Normalisation decides what "the same" means: by default Unicode's form C, folded
    case, and each run of white space as one space. A text that is empty then is like
    every other empty one.
    """

    stage: Literal["exact"] = "exact"
    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalisation form before comparing; none: code points as they are."""
    case: bool = True
    """True: case makes no difference; false: texts that differ in case differ."""
    spaces: bool = True
    """True: how much white space there is, and which, makes no difference; false: it
    does."""
    index: LocalPath | None = None
    """A folder that remembers the texts of every corpus that is run with it, 16 bytes a
    text, for the label `seen_before`; null: there is no such memory. When the recipe is
    done, the texts that its rules keep are entered; those that rules drop are not, so
    that another corpus may keep them. Each corpus is compared with those that looked
    into the index before it, also when it is run again, and from another place: corpora
    are told apart by the file `corpus.id` in their folder. A corpus made anew in a
    deleted folder is another one: delete the old one's entry (`NUMBER-ID.digests`). A
    stage that is done does not look again: to compare with entries that have changed,
    delete its folder."""

    label_types: ClassVar[LabelTypes] = {
        "duplicate": pa.bool_(),  # another copy is kept
        "of": pa.large_string(),  # which one
        "copies": pa.int64(),  # this one and the kept one included
        # a corpus that entered the index earlier keeps the text
        "seen_before": pa.bool_(),
        # the best copy's number in the corpus; null: there are no others
        "group": pa.int64(),
    }
    verdicts: ClassVar[Verdicts] = {"duplicate": False, "of": None}
    version: ClassVar[int] = 5
    depends_on_unicode: ClassVar[bool] = True

    def normalize_text(self, text: str) -> str:
        """Returns the text that is hashed."""
        if self.unicode != "none":
            text = normalize_unicode(self.unicode, text)
        if self.case:
            text = text.casefold()
            if self.unicode != "none" and not text.isascii():
                # Folding may take letters apart.
                text = normalize_unicode(self.unicode, text)
        return " ".join(text.split()) if self.spaces else text

    def compute_digest(self, text: str) -> bytes:
        """Computes the digest by which texts are compared: 16 bytes."""
        return hashlib.sha256(self.normalize_text(text).encode()).digest()[:16]

    def reserve_entry(self, corpus: Path) -> tuple[list[Path], Path]:
        """Finds the index's entries of corpora before this one, and its own; see
        `index`."""
        assert self.index is not None
        settings = self.model_dump(include={"unicode", "case", "spaces"})
        index = Path(self.index).expanduser()
        return reserve_index_entry(index, corpus, settings | {"version": self.version})

    def label(
        self, shards: Sequence[StageShardView], scratch: Path, run_jobs: JobRunner
    ) -> None:
        """Hashes each shard, groups each range of hashes, labels each shard."""
        earlier_entries: list[Path] = []
        if self.index is not None and shards:
            earlier_entries, _ = self.reserve_entry(shards[0].folder)
        hash_shard = partial(_hash_shard, self, scratch, earlier_entries)
        run_jobs(hash_shard, shards, "hash")

        members = open_selected_documents(scratch, shards)
        num_ranges = count_ranges(members.num_selected, _MEMBER_BYTES, self.memory)
        hashes = [get_shard_path(scratch, "hashes", shard.name) for shard in shards]
        has_ranks = self.keep_by is not None
        group = partial(write_copies, scratch, hashes, num_ranges, has_ranks=has_ranks)
        run_jobs(group, range(num_ranges), "group")

        label_shard = partial(_label_shard, members, num_ranges)
        run_jobs(label_shard, list(enumerate(shards)), "label")


def _hash_shard(
    stage: ExactStage,
    scratch: Path,
    earlier_entries: Sequence[Path],
    shard: StageShardView,
) -> None:
    """Writes a shard's members, which of them earlier corpora have, and the two halves
    of their digests, sorted."""
    path = get_shard_path(scratch, "hashes", shard.name)
    if path.exists():
        return
    members = []
    digests = bytearray()
    for group in shard.read_selected_rows(("id", *stage.input_columns)):
        for text in group.batch.column("text"):
            digests += stage.compute_digest(text.as_py())
        members.append(replace(group, batch=group.batch.drop_columns(["text"])))
    rank = write_members(scratch, shard.name, members, stage.keep_by)
    is_indexed = mark_indexed_texts(np.frombuffer(digests, DIGEST), earlier_entries)
    write_columns(
        get_shard_path(scratch, "seen", shard.name),
        {"seen": is_indexed.astype(np.uint8)},
    )
    columns = sort_digests(digests, rank, np.arange(len(rank)))
    write_columns(path, columns)  # Last: it says that the shard is done.


def _label_shard(
    members: SelectedDocuments, num_ranges: int, part: tuple[int, StageShardView]
) -> None:
    """Writes the labels of a shard. `part`: its index and it."""
    index, shard = part
    rows = members.map_shard(index).column("row").to_numpy()
    offsets = np.array(members.shard_offsets)
    copies = read_copies(members.folder, num_ranges, index)
    member = offsets[index] + copies.place
    source = offsets[copies.source_file] + copies.source_place

    # Of documents without copies: duplicates of none, alone, in no group.
    duplicate_of = np.full(len(rows), -1, np.int64)
    duplicate_of[copies.place] = np.where(source == member, -1, source)
    num_copies = np.ones(len(rows), np.int64)
    num_copies[copies.place] = copies.copies
    group = np.full(len(rows), -1, np.int64)
    group[copies.place] = members.get_document_numbers(source)
    seen_path = get_shard_path(members.folder, "seen", shard.name)
    is_indexed = read_columns(seen_path)["seen"]
    labels = {
        "duplicate": duplicate_of >= 0,
        "of": members.take("id", duplicate_of),
        "copies": num_copies,
        "seen_before": is_indexed.astype(np.bool_),
        "group": pa.array(group, mask=group < 0),
    }
    write_labels(shard, ExactStage, rows, labels)
