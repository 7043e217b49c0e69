"""Exact deduplication: documents whose normalised texts are the same."""

import hashlib
import json
import re
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from maxlm.config import LocalPath, MaxlmError
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
from maxlm.runtime.files import convert_write_errors, lock_folder, replace_file

_BYTES = 256  # A member's share of a range job's memory, with its sorted copies.
_DIGEST = "S32"  # Compared with trailing zeros ignored, which is right for one width.
_ENTRY = re.compile(r"\d{6}-[\w-]+\.digests")


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
    index: LocalPath | None = None
    """A folder that remembers the texts of every corpus that was deduplicated with it, 32 bytes a
    text, for the label `seen_before`; null: there is no such memory. Each corpus is compared with
    those that entered the index before it, so one that is run again gets the same labels, also
    from another place: corpora are told apart by the file `corpus.id` in their folder. So a corpus
    has one entry, and one stage of a recipe uses an index; a corpus made anew in a deleted folder
    is another one, to which the old one's entry (`NUMBER-ID.digests`, to be deleted) is an earlier
    corpus. A stage that is done enters nothing again: after the index was deleted, delete the
    stage's folder as well, and those of stages that read `seen_before`."""

    version: ClassVar[int] = 4
    depends_on_unicode: ClassVar[bool] = True

    def schema(self) -> pa.Schema:
        return pa.schema(
            [
                ("duplicate", pa.bool_()),  # another copy is kept
                ("of", pa.large_string()),  # which one; large: no category to be counted
                ("copies", pa.int64()),  # this one and the kept one included
                ("seen_before", pa.bool_()),  # in a corpus that entered the index earlier
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
        folder = Path(self.index).expanduser() if self.index else None
        with lock_folder(folder) if folder else nullcontext():
            earlier, own = (), None
            if folder and shards:
                self._check_index(folder)
                earlier, own = _find_entries(folder, shards[0].folder)
            run_jobs(partial(_hash_shard, self, scratch), shards, "hash")
            members = open_selected_documents(scratch, shards)
            number = max(1, -(-members.num_selected * _BYTES // self.memory))
            # A killed run may have had other ranges, or another index.
            out = scratch / "ranges" / f"{number}-{len(earlier)}"
            run_jobs(partial(_group_range, members, out, number, earlier), range(number), "group")
            label = partial(_label_shard, self.schema(), members, out, number)
            run_jobs(label, list(enumerate(shards)), "label")
            if own:
                with replace_file(own) as new, new.open("wb") as entry:
                    for i in range(number):
                        entry.write((out / f"{i}.digests").read_bytes())

    def _check_index(self, folder: Path) -> None:
        """Write down how the index's texts are normalised, or compare with what is there."""
        settings = self.model_dump(include={"unicode", "case", "spaces"})
        settings |= {"version": 2}  # Of `normalise`.
        path = folder / "settings.json"
        if not path.exists():
            with replace_file(path) as new:
                new.write_text(json.dumps(settings))
        elif (theirs := json.loads(path.read_text())) != settings:
            what = f"this index holds texts normalised by {theirs}, not by {settings}"
            raise MaxlmError(what, where=str(path), fix="set the same, or name another folder")


def _find_entries(index: Path, corpus: Path) -> tuple[tuple[Path, ...], Path]:
    """The entries of an index, NUMBER-ID.digests, of corpora that came before a corpus, and that
    corpus's own: a file of sorted digests each."""
    path = corpus / "corpus.id"  # Tells a corpus from others wherever it lies.
    if not path.exists():
        with replace_file(path) as new:
            new.write_text(uuid.uuid4().hex)
    name = f"{path.read_text().strip()}.digests"
    entries = sorted(each for each in index.iterdir() if _ENTRY.fullmatch(each.name))
    last = int(entries[-1].name[:6]) if entries else 0
    own = next((each for each in entries if each.name[7:] == name), None)
    own = own or index / f"{last + 1:06d}-{name}"
    return tuple(each for each in entries if each.name < own.name), own


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


def _group_range(
    members: SelectedDocuments, folder: Path, number: int, earlier: tuple[Path, ...], which: int
) -> None:
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
    seen = np.zeros(len(texts), np.bool_)
    for path in earlier:
        known = np.memmap(path, _DIGEST, "r") if path.stat().st_size else np.empty(0, _DIGEST)
        known = known[find_range(known, starts, which)]
        places = np.searchsorted(known, texts)
        found = places < len(known)
        seen[found] |= known[places[found]] == texts[found]
    columns = {
        "shard": concatenate(origin, np.int32),
        "kept": kept[text],
        "copies": copies[text],
        "seen": seen[text].astype(np.uint8),
    }
    with convert_write_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
        texts.tofile(out.with_suffix(".digests"))
    write_columns(out, columns)


def _label_shard(
    schema: pa.Schema,
    members: SelectedDocuments,
    folder: Path,
    number: int,
    part: tuple[int, StageShardView],
) -> None:
    which, shard = part
    found = {"kept": [], "copies": [], "seen": []}
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
        "seen_before": concatenate(found["seen"], np.uint8)[text].astype(np.bool_),
    }
    write_labels(shard, schema, read_columns(members.shard_path(which))["row"], labels)


def _digest_file(scratch: Path, shard: str) -> Path:
    return scratch / "digests" / f"{shard}.arrow"
