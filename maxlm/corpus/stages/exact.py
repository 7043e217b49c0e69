"""Exact deduplication: documents whose normalised texts are the same."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from maxlm.config import LocalPath, MaxlmError
from maxlm.corpus.characters import UNICODE
from maxlm.corpus.dedup.columns import (
    concatenate,
    find_range,
    hash_range_starts,
    mark_run_starts,
    open_columns,
    write_columns,
)
from maxlm.corpus.dedup.members import (
    MemberList,
    Members,
    get_member_path,
    number_members,
    write_labels,
)
from maxlm.corpus.dedup.steps import StepRunner
from maxlm.corpus.normalization import normalize
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import CorpusStage
from maxlm.runtime.executor import Executor
from maxlm.runtime.files import convert_write_errors, lock_folder, replace_file
from maxlm.runtime.progress import Progress

_BYTES = 256  # A member's share of a range job's memory, with its sorted copies.
_WIDTH = 32
_DIGEST = f"S{_WIDTH}"  # Compared with trailing zeros ignored, which is right for one width.
_ENTRY = re.compile(r"\d{6}-[\w-]+\.digests")
_ID = re.compile(r"[0-9a-f]{32}")


class ExactStage(CorpusStage):
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

    version: ClassVar[int] = 3
    verdicts: ClassVar[tuple[str, ...]] = ("duplicate",)

    def schema(self) -> pa.Schema:
        return pa.schema(
            [
                ("duplicate", pa.bool_()),  # another copy is kept
                ("of", pa.large_string()),  # which one; large: no category to be counted
                ("copies", pa.int64()),  # this one and the kept one included
                ("seen_before", pa.bool_()),  # in a corpus that entered the index earlier
                ("cluster", pa.int64()),  # the number of the best copy; null: there are no others
            ]
        )

    def key(self) -> str:
        return f"{super().key()} {UNICODE}"

    def normalise(self, text: str) -> str:
        """The text that is hashed."""
        if self.unicode != "none":
            text = normalize(self.unicode, text)
        if self.case:
            text = text.casefold()
            if self.unicode != "none" and not text.isascii():
                text = normalize(self.unicode, text)  # Folding may take letters apart.
        return " ".join(text.split()) if self.spaces else text

    def label(
        self, shards: Sequence[StageShardView], scratch: Path, engine: Executor, progress: Progress
    ) -> None:
        """See `CorpusStage.label`: hash each shard, group each range of hashes, label each shard.

        Raises:
            MaxlmError: the index is of other settings or damaged, or another run is using it.
        """
        folder = Path(self.index).expanduser() if self.index else None
        with lock_folder(folder) if folder else nullcontext():
            index = _Index(folder, self, shards) if folder and shards else None
            if index:
                index.check()

            steps = StepRunner(self.title, engine, progress)
            steps.run("hash", _hash_shard, [_HashJob(self, shard, scratch) for shard in shards])
            members = number_members(scratch, shards)
            number = max(1, -(-members.total * _BYTES // self.memory))
            earlier = tuple(index.earlier) if index else ()
            # Not to be mixed up with what a killed run of other ranges, or another index, left.
            out = scratch / "ranges" / f"{number}-{len(earlier)}"
            with convert_write_errors(out):
                out.mkdir(parents=True, exist_ok=True)
            groups = [_GroupJob(members, out, number, i, earlier) for i in range(number)]
            steps.run("group", _group_range, groups)
            labels = [_LabelJob(self, s, members, i, out, number) for i, s in enumerate(shards)]
            steps.run("label", _label_shard, labels)
            if index:
                index.add([out / f"{i}.digests" for i in range(number)])


@dataclass(frozen=True)
class _HashJob:
    stage: ExactStage
    shard: StageShardView
    scratch: Path


def _hash_shard(job: _HashJob) -> None:
    """Write a shard's members, and their digests sorted, of equal ones the best first."""
    stage, shard = job.stage, job.shard
    out = _digest_file(job.scratch, shard.name)
    if out.exists():
        return
    members, digests = MemberList(stage.keep_by), []
    for group in shard.rows((*members.reads, *stage.reads)):
        texts = (stage.normalise(text.as_py()) for text in group.batch.column("text"))
        digests += [hashlib.sha256(text.encode()).digest() for text in texts]
        members.add(group)
    rank = members.write(get_member_path(job.scratch, shard.name))
    digest = np.array(digests, _DIGEST)
    order = np.lexsort((-rank, digest))
    write_columns(out, {"digest": digest[order], "member": order, "rank": rank[order]})


@dataclass(frozen=True)
class _GroupJob:
    members: Members
    ranges: Path
    number: int
    which: int
    earlier: tuple[Path, ...]


def _group_range(job: _GroupJob) -> None:
    """Find the best copy of each text in one range of digests.

    Of each shard only the best copy takes part, so a text that is everywhere needs no more memory
    than one entry a shard.
    """
    members, which = job.members, job.which
    out = job.ranges / f"{which}.arrow"
    if out.exists():
        return
    starts = _digest_ranges(job.number)
    digests, best, rank, counts, origin = [], [], [], [], []
    for number, name in enumerate(members.shards):
        with open_columns(_digest_file(members.folder, name)) as columns:
            part = find_range(columns["digest"], starts, which)
            places = np.flatnonzero(mark_run_starts(columns["digest"][part]))
            counts.append(np.diff(places, append=part.stop - part.start))
            digests.append(columns["digest"][part][places])
            best.append(columns["member"][part][places] + members.first[number])
            rank.append(columns["rank"][part][places])
            origin.append(np.full(len(places), number, np.int32))
    digest, member = concatenate(digests, _DIGEST), concatenate(best, np.int64)
    texts, text = np.unique(digest, return_inverse=True)
    order = np.lexsort((member, -concatenate(rank, np.float64), text))
    kept = member[order][mark_run_starts(text[order])]
    copies = np.zeros(len(texts), np.int64)
    np.add.at(copies, text, concatenate(counts, np.int64))
    seen = np.zeros(len(texts), np.bool_)
    for path in job.earlier:
        known = _read_digests(path)
        known = known[find_range(known, starts, which)]
        places = np.searchsorted(known, texts)
        found = places < len(known)
        seen[found] |= known[places[found]] == texts[found]
    with convert_write_errors(out):
        texts.tofile(out.with_suffix(".digests"))
    write_columns(
        out,
        {
            "shard": concatenate(origin, np.int32),
            "kept": kept[text],
            "copies": copies[text],
            "seen": seen[text].astype(np.uint8),
        },
    )


@dataclass(frozen=True)
class _LabelJob:
    stage: ExactStage
    shard: StageShardView
    members: Members
    which: int
    ranges: Path
    number: int


def _label_shard(job: _LabelJob) -> None:
    members, which = job.members, job.which
    found = {"kept": [], "copies": [], "seen": []}
    for each in range(job.number):
        with open_columns(job.ranges / f"{each}.arrow") as columns:
            start, stop = np.searchsorted(columns["shard"], [which, which + 1])
            for name, parts in found.items():
                parts.append(columns[name][start:stop])
    with open_columns(_digest_file(members.folder, job.shard.name)) as columns:
        text = np.empty(len(columns), np.int64)  # Of each member: which of the shard's texts.
        text[columns["member"]] = np.cumsum(mark_run_starts(columns["digest"])) - 1
    kept = concatenate(found["kept"], np.int64)[text]
    duplicate = kept != np.arange(len(text)) + members.first[which]
    ids = members.take("id", kept[duplicate]).cast(pa.large_string())
    places = np.cumsum(duplicate) - 1
    copies = concatenate(found["copies"], np.int64)[text]
    with open_columns(members.file(which)) as columns:
        labels = {
            "duplicate": duplicate,
            "of": ids.take(pa.array(places, mask=~duplicate)),
            "copies": copies,
            "seen_before": concatenate(found["seen"], np.uint8)[text].astype(np.bool_),
            "cluster": pa.array(members.documents(kept), mask=copies == 1),
        }
        write_labels(job.shard, job.stage.schema(), columns["row"], labels)


class _Index:
    """The memory of earlier corpora: a file of sorted digests for each, numbered as they came."""

    def __init__(self, folder: Path, stage: ExactStage, shards: Sequence[StageShardView]):
        self._folder = folder
        settings = stage.model_dump(include={"unicode", "case", "spaces"})
        self._settings = settings | {"version": 2}  # Of `normalise`.
        self._name = f"{_corpus_id(shards[0].folder)}.digests"

    @cached_property
    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.iterdir() if _ENTRY.fullmatch(path.name))

    @cached_property
    def _own(self) -> Path:
        for path in self._files:
            if path.name.partition("-")[2] == self._name:
                return path
        last = int(self._files[-1].name.partition("-")[0]) if self._files else 0
        return self._folder / f"{last + 1:06d}-{self._name}"

    @property
    def earlier(self) -> list[Path]:
        return [path for path in self._files if path.name < self._own.name]

    def check(self) -> None:
        """Write down how the index's texts are normalised, or compare with what is there.

        Raises:
            MaxlmError: it is something else, or a file is damaged.
        """
        for file in self._files:
            if file.stat().st_size % _WIDTH:
                what = "this file of the index is damaged"
                fix = "restore it, or delete it: its texts are forgotten then"
                raise MaxlmError(what, where=str(file), fix=fix)
        path = self._folder / "settings.json"
        if not path.exists():
            with replace_file(path) as new:
                new.write_text(json.dumps(self._settings))
            return
        try:
            theirs = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            what = f"cannot read how the index's texts are normalised ({error})"
            fix = f"if it was as now, write {json.dumps(self._settings)}"
            raise MaxlmError(what, where=str(path), fix=fix) from error
        if theirs != self._settings:
            what = f"this index holds texts normalised by {theirs}, not by {self._settings}"
            raise MaxlmError(what, where=str(path), fix="set the same, or name another folder")

    def add(self, parts: Sequence[Path]) -> None:
        """Enter this corpus, or replace what it entered before: all or nothing."""
        for left in self._folder.glob(f".*{self._name}.*"):  # By one that was killed here.
            left.unlink()
        with replace_file(self._own) as new, new.open("wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out)
            out.flush()
            os.fsync(out.fileno())


def _corpus_id(corpus: Path) -> str:
    """Reads the id that tells a corpus from others wherever it lies; chosen at first use."""
    path = corpus / "corpus.id"
    if not path.exists():
        with replace_file(path) as new:
            new.write_text(uuid.uuid4().hex)
    with convert_write_errors(path):
        found = path.read_text(errors="replace").strip()
    if not _ID.fullmatch(found):
        fix = "write there the ID of the corpus's entry in the index, NUMBER-ID.digests"
        raise MaxlmError("this file is damaged", where=str(path), fix=fix)
    return found


def _read_digests(path: Path) -> np.ndarray:
    size = path.stat().st_size
    return np.memmap(path, _DIGEST, "r") if size else np.empty(0, _DIGEST)


def _digest_ranges(number: int) -> np.ndarray:
    return hash_range_starts(number).astype(">u8").view("S8").astype(_DIGEST)


def _digest_file(scratch: Path, shard: str) -> Path:
    return scratch / "digests" / f"{shard}.arrow"
