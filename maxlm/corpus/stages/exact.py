"""Exact deduplication: documents whose normalised texts are the same."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from maxlm.corpus.dedup.columns import (
    concatenate,
    find_range,
    hash_range_starts,
    mark_run_starts,
    read_columns,
    write_columns,
)
from maxlm.corpus.dedup.members import (
    SelectedDocuments,
    SelectedDocumentsWriter,
    get_member_path,
    open_selected_documents,
    write_labels,
)
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CrossDocumentStage, JobRunner
from maxlm.corpus.text import normalize

_BYTES = 256  # A member's share of a range job's memory, with its sorted copies.
_DIGEST = "S32"  # Compared with trailing zeros ignored, which is right for one width.


class ExactStage(CrossDocumentStage):
    """Documents with the same SHA-256 of their normalised text are copies; the best is kept.

    Normalisation decides what "the same" means: by default Unicode's form C, folded case, and each
    run of white space as one space. A text that is empty then is like every other empty one.
    """

    stage: Literal["exact"] = "exact"
    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalisation form before comparing; none: code points as they are."""
    case: bool = True
    """True: case makes no difference; false: texts that differ in case differ."""
    spaces: bool = True
    """True: how much white space there is, and which, makes no difference; false: it does."""

    version: ClassVar[int] = 4
    depends_on_unicode: ClassVar[bool] = True

    def schema(self) -> pa.Schema:
        return pa.schema(
            [
                ("duplicate", pa.bool_()),  # another copy is kept
                ("of", pa.large_string()),  # which one; large: no category to be counted
                ("copies", pa.int64()),  # this one and the kept one included
            ]
        )

    def normalise(self, text: str) -> str:
        """Returns the text that is hashed."""
        if self.unicode != "none":
            text = normalize(self.unicode, text)
        if self.case:
            text = text.casefold()
            if self.unicode != "none" and not text.isascii():
                text = normalize(self.unicode, text)  # Folding may take letters apart.
        return " ".join(text.split()) if self.spaces else text

    def label(self, shards: Sequence[StageShardView], scratch: Path, run_jobs: JobRunner) -> None:
        """Hash each shard, group each range of hashes, label each shard."""
        run_jobs(partial(_hash_shard, self, scratch), shards, "hash")
        members = open_selected_documents(scratch, shards)
        number = max(1, -(-members.num_selected * _BYTES // self.memory))
        out = scratch / "ranges" / str(number)  # A killed run may have had other ranges.
        run_jobs(partial(_group_range, members, out, number), range(number), "group")
        label = partial(_label_shard, self.schema(), members, out, number)
        run_jobs(label, list(enumerate(shards)), "label")


def _hash_shard(stage: ExactStage, scratch: Path, shard: StageShardView) -> None:
    """Write a shard's members, and their digests sorted, of equal ones the best first."""
    out = _digest_file(scratch, shard.name)
    if out.exists():
        return
    members, digests = SelectedDocumentsWriter(stage.keep_by), []
    for group in shard.read_selected_rows((*members.input_columns, *stage.input_columns)):
        texts = (stage.normalise(text.as_py()) for text in group.batch.column("text"))
        digests += [hashlib.sha256(text.encode()).digest() for text in texts]
        members.add(group)
    rank = members.write(get_member_path(scratch, shard.name))
    digest = np.array(digests, _DIGEST)
    order = np.lexsort((-rank, digest))
    write_columns(out, {"digest": digest[order], "member": order, "rank": rank[order]})


def _group_range(members: SelectedDocuments, folder: Path, number: int, which: int) -> None:
    """Find the best copy of each text in one of `number` ranges of digests.

    Of each shard only the best copy takes part, so a text that is everywhere needs no more memory
    than one entry a shard.
    """
    out = folder / f"{which}.arrow"
    if out.exists():
        return
    starts = hash_range_starts(number).astype(">u8").view("S8").astype(_DIGEST)
    digests, best, rank, counts, origin = [], [], [], [], []
    for shard, name in enumerate(members.shards):
        columns = read_columns(_digest_file(members.folder, name))
        part = find_range(columns["digest"], starts, which)
        places = np.flatnonzero(mark_run_starts(columns["digest"][part]))
        counts.append(np.diff(places, append=part.stop - part.start))
        digests.append(columns["digest"][part][places])
        best.append(columns["member"][part][places] + members.shard_offsets[shard])
        rank.append(columns["rank"][part][places])
        origin.append(np.full(len(places), shard, np.int32))
    digest, member = concatenate(digests, _DIGEST), concatenate(best, np.int64)
    texts, text = np.unique(digest, return_inverse=True)
    order = np.lexsort((member, -concatenate(rank, np.float64), text))
    kept = member[order][mark_run_starts(text[order])]
    copies = np.zeros(len(texts), np.int64)
    np.add.at(copies, text, concatenate(counts, np.int64))
    columns = {
        "shard": concatenate(origin, np.int32),
        "kept": kept[text],
        "copies": copies[text],
    }
    write_columns(out, columns)


def _label_shard(
    schema: pa.Schema,
    members: SelectedDocuments,
    folder: Path,
    number: int,
    part: tuple[int, StageShardView],
) -> None:
    which, shard = part
    found = {"kept": [], "copies": []}
    for each in range(number):
        columns = read_columns(folder / f"{each}.arrow")
        start, stop = np.searchsorted(columns["shard"], [which, which + 1])
        for name, parts in found.items():
            parts.append(columns[name][start:stop])
    columns = read_columns(_digest_file(members.folder, shard.name))
    text = np.empty(len(columns), np.int64)  # Of each member: which of the shard's texts.
    text[columns["member"]] = np.cumsum(mark_run_starts(columns["digest"])) - 1
    kept = concatenate(found["kept"], np.int64)[text]
    duplicate = kept != np.arange(len(text)) + members.shard_offsets[which]
    ids = members.take("id", kept[duplicate]).cast(pa.large_string())
    places = np.cumsum(duplicate) - 1
    labels = {
        "duplicate": duplicate,
        "of": ids.take(pa.array(places, mask=~duplicate)),
        "copies": concatenate(found["copies"], np.int64)[text],
    }
    write_labels(shard, schema, read_columns(members.shard_path(which))["row"], labels)


def _digest_file(scratch: Path, shard: str) -> Path:
    return scratch / "digests" / f"{shard}.arrow"
