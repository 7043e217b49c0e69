"""Settling which of several documents keeps a text: among those that the other rules keep.

Stages that compare documents label them as if all were kept: the best copy is no duplicate, the
others are. If a rule drops the best copy, its text would be in no kept document. So before rules
are applied, the labels that say who loses (`CrossDocumentStage.verdicts`) are settled anew from
what the stages found: clusters of copies, pairs that are alike, places of repeated passages. A
document may keep a text for others only if every rule keeps it, and no later stage drops it:

1. Without any verdict, which documents do the rules keep? Only these *may keep*.
2. Stage by stage its verdicts among them, those on documents first, and then which of them the
   rules still keep.
3. Where a passage stays in a document that the rules drop in the end (since most of it is cut), all
   such documents and their copies are barred from keeping a text for others, and it begins anew;
   from the fourth time on with all that are alike, so that it ends soon.

The settled labels lie beside the others, in settled/KEY, a file for each shard, and are made once
for the same rules. Memory: some 20 bytes for each document, 50 more for each that has copies, 200
for each pair that is alike, 100 for each repeated passage.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count

import numpy as np
import pyarrow as pa

from maxlm.corpus.cuts import CUTS, merge_spans
from maxlm.corpus.dedup.columns import concatenate, read_columns
from maxlm.corpus.dedup.components import SimilarPairs, resolve_duplicates
from maxlm.corpus.dedup.members import compute_document_offsets, compute_keep_scores
from maxlm.corpus.dedup.windows import match_earlier_copies
from maxlm.corpus.expression import Expression
from maxlm.corpus.opened import OpenCorpus
from maxlm.corpus.recipe import FilterRules, find_dedup_stages
from maxlm.corpus.shards import ShardWriter, StageShardView
from maxlm.corpus.stage import CrossDocumentStage
from maxlm.corpus.stages.near import NearStage
from maxlm.corpus.stages.substring import REPEATS
from maxlm.runtime.progress import Progress, ignore_progress

_VERSION = 1
_NEUTRAL = {"duplicate": False, "jaccard": np.nan, "cut_share": 0.0}
_TYPES = {"duplicate": pa.bool_(), "cuts": CUTS}

DedupStages = Sequence[tuple[CrossDocumentStage, Expression | None]]
"""Stages whose verdicts matter, and which documents each looks at."""


def resolve_duplicates_for_rules(
    corpus: OpenCorpus, rules: FilterRules, progress: Progress = ignore_progress
) -> list[StageShardView]:
    """Returns the corpus's shards, with verdicts as they are among documents that `rules` keep."""
    stages = find_dedup_stages(corpus.recipe, rules)
    if not stages:
        return corpus.shards
    manifests = [corpus.read_manifest(title) for title in corpus.list_stages()]
    parts = [_VERSION, [(each["key"], each.get("shards_sha256")) for each in manifests]]
    parts.append(list(rules.cut))
    parts.append({name: rule.text for name, rule in rules.keep.items()})
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    home = corpus.folder / "settled" / key
    names = tuple(f"{stage.unique_name}.{label}" for stage, _ in stages for label in stage.verdicts)
    if not home.exists():
        new = home.with_name(f".{key}.{os.getpid()}")
        try:
            _Settling(corpus, rules, stages, progress).write(new.relative_to(corpus.folder), names)
            new.mkdir(parents=True, exist_ok=True)  # Of no shards.
            with suppress(OSError):  # Another process was faster.
                new.rename(home)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    folder = str(home.relative_to(corpus.folder))
    return [
        replace(shard, resolved_labels=names, resolved_folder=folder) for shard in corpus.shards
    ]


def list_rule_columns(rules: FilterRules, stages: DedupStages) -> list[str]:
    """Lists the columns that the rules and `where` look at, but for verdicts."""
    wheres = [name for _, where in stages if where is not None for name in where.label_names]
    verdicts = set().union(*(stage.verdict_labels for stage, _ in stages))
    names = dict.fromkeys(["source", *rules.label_names, *wheres])
    return [name for name in names if name not in verdicts]


def add_verdict_columns(
    table: pa.RecordBatch, stages: DedupStages, verdicts: Mapping[str, np.ndarray]
) -> pa.RecordBatch:
    """Adds to documents' labels the verdicts of stages: of a stage that is not in `verdicts`, those
    on documents that are like no other."""
    columns = dict(zip(table.schema.names, table.columns, strict=True))
    for stage, where in stages:
        unseen = np.zeros(table.num_rows, np.bool_)
        if where is not None:
            unseen = ~where.evaluate(pa.RecordBatch.from_pydict(columns))
        for label in _NEUTRAL.keys() & set(stage.verdicts):
            name = f"{stage.unique_name}.{label}"
            value = verdicts.get(name, np.full(table.num_rows, _NEUTRAL[label]))
            none = unseen if label == "duplicate" else unseen | np.isnan(value)
            columns[name] = pa.array(value, mask=none)
    return pa.RecordBatch.from_pydict(columns)


class _Settling:
    def __init__(
        self, corpus: OpenCorpus, rules: FilterRules, stages: DedupStages, progress: Progress
    ):
        self._corpus, self._rules, self._stages = corpus, rules, stages
        self._progress = progress
        self._first = compute_document_offsets(corpus.shards)
        self._verdicts: dict[str, np.ndarray] = {}
        self._copies: list[np.ndarray] = []
        self._found = {stage.unique_name: self._read_found(stage) for stage, _ in stages}
        self._cuts: dict[str, tuple[np.ndarray, ...]] = {}
        self._settle()

    def _settle(self) -> None:
        barred = np.zeros(self._first[-1], np.bool_)
        for attempt in count():
            self._verdicts, self._cuts = {}, {}
            may_keep = self._kept() & ~barred
            trusted = np.zeros_like(barred)
            for stage, _ in self._stages:
                if "duplicate" in stage.verdicts:
                    self._settle_documents(stage, may_keep)
                else:
                    trusted |= may_keep
                    self._settle_passages(stage, may_keep, barred)
                may_keep &= self._kept()
            failed = trusted & ~may_keep
            if not failed.any():
                return
            self._add_copies(failed, and_alike=attempt >= 3)
            barred |= failed

    def _add_copies(self, failed: np.ndarray, and_alike: bool) -> None:
        """Add to the documents that failed (bool [documents]) those with the same text, which would
        be tried and fail one after the other."""
        names = [("copy", "best"), ("low", "high")][: 1 + and_alike]
        for found in self._found.values():
            ends = [(found[one], found[other]) for one, other in names if one in found]
            for one, other in 2 * ends:  # Copies are linked by the best of them.
                both = failed[one] | failed[other]
                failed[one[both]] = failed[other[both]] = True

    def _groups(self, columns: Sequence[str], title: str) -> Iterator[tuple[slice, pa.RecordBatch]]:
        """Yields each row group, with the slice of the corpus's documents that it holds."""
        shards = self._corpus.shards
        for number, shard in enumerate(shards):
            start = self._first[number]
            for table in shard.read_row_groups(columns):
                yield slice(start, start + table.num_rows), table
                start += table.num_rows
            self._progress(f"settling duplicates: {title}", number + 1, len(shards))

    def _kept(self) -> np.ndarray:
        """Marks documents that fulfil the rules by the verdicts so far: bool [documents]."""
        keep = np.ones(self._first[-1], np.bool_)
        for documents, labelled in self._add_verdicts("rules"):
            for rule in self._rules.keep.values():
                keep[documents] &= rule.evaluate(labelled)
        return keep

    def _add_verdicts(self, title: str) -> Iterator[tuple[slice, pa.RecordBatch]]:
        """Yields each row group's labels, with the verdicts so far among them."""
        for documents, table in self._groups(list_rule_columns(self._rules, self._stages), title):
            verdicts = {name: value[documents] for name, value in self._verdicts.items()}
            yield documents, add_verdict_columns(table, self._stages, verdicts)

    def _read_found(self, stage: CrossDocumentStage) -> dict[str, np.ndarray]:
        """Reads what a stage found, with documents by their numbers, and each document's rank."""
        rank = np.zeros(self._first[-1])
        for documents, table in self._groups(stage.rank_columns, "ranks") if stage.keep_by else ():
            rank[documents] = compute_keep_scores(table, stage.keep_by)
        if "duplicate" not in stage.verdicts:
            return self._read_passages(stage.unique_name) | {"rank": rank}
        if isinstance(stage, NearStage):
            columns = read_columns(self._corpus.folder / stage.unique_name / "pairs.arrow")
            found = {name: columns[name] for name in ("low", "high", "jaccard")}
            found |= dict.fromkeys(("copy", "best"), np.empty(0, np.int64))
            self._link_copies(found)
        else:
            parts = [np.empty((2, 0), np.int64)]
            for documents, table in self._groups(
                [f"{stage.unique_name}.cluster"], stage.unique_name
            ):
                best = table.column(0).fill_null(-1).to_numpy()
                copy = np.arange(documents.start, documents.stop)
                parts.append(np.stack([copy, best])[:, (best >= 0) & (best != copy)])
            copy, best = np.concatenate(parts, 1)
            self._copies.append(np.stack([copy, best]))
            none = np.empty(0, np.int64)
            found = vars(SimilarPairs(none, none, none, copy, best))
        return found | {"rank": rank}

    def _link_copies(self, found: dict[str, np.ndarray]) -> None:
        """Copies that a stage left out by `where` stand where the copy stands that it looked at."""
        for copy, best in self._copies:
            seen = [found[name] for name in ("low", "high", "copy", "best")]
            new = ~np.isin(copy, np.concatenate(seen))
            copy, best = copy[new], best[new]
            if len(known := found["copy"]):
                order = np.argsort(known)
                place = order[np.searchsorted(known, best, sorter=order) % len(order)]
                best = np.where(known[place] == best, found["best"][place], best)
            found["copy"] = np.concatenate([known, copy])
            found["best"] = np.concatenate([found["best"], best])

    def _settle_documents(self, stage: CrossDocumentStage, may_keep: np.ndarray) -> None:
        found, title = self._found[stage.unique_name], stage.unique_name
        alike = SimilarPairs(*(found[name] for name in SimilarPairs.__dataclass_fields__))
        marks = resolve_duplicates(alike, lambda documents: found["rank"][documents], may_keep)
        lost = marks.duplicate_of >= 0
        self._verdicts[f"{title}.duplicate"] = np.zeros(len(may_keep), np.bool_)
        self._verdicts[f"{title}.duplicate"][marks.member[lost]] = True
        if "jaccard" in stage.verdicts:
            self._verdicts[f"{title}.jaccard"] = np.full(len(may_keep), np.nan)
            self._verdicts[f"{title}.jaccard"][marks.member[lost]] = marks.jaccard[lost]

    def _read_passages(self, title: str) -> dict[str, np.ndarray]:
        names = [field.name for field in REPEATS.value_type]
        found: dict[str, list] = {name: [] for name in ("document", *names, "some", "size")}
        columns = [f"{title}.{label}" for label in ("repeats", "cuts", "cut_share")]
        for documents, table in self._groups(columns, title):
            repeats, cuts, share = table.columns
            rows, numbers = table.num_rows, np.arange(documents.start, documents.stop)
            counts, pieces = (c.value_lengths().fill_null(0).to_numpy() for c in (repeats, cuts))
            found["document"].append(np.repeat(numbers, counts))
            for name, field in zip(names, repeats.flatten().flatten(), strict=True):
                found[name].append(field.to_numpy().astype(np.int64))
            # How long a text is follows from what all its cuts are, and are of it.
            starts, ends = (field.to_numpy() for field in cuts.flatten().flatten())
            lost = np.bincount(np.repeat(np.arange(rows), pieces), ends - starts, rows)
            some = np.flatnonzero(counts)
            found["some"].append(numbers[some])
            found["size"].append(np.rint(lost[some] / share.fill_null(1).to_numpy()[some]))
        return {name: concatenate(parts, np.int64) for name, parts in found.items()}

    def _settle_passages(
        self, stage: CrossDocumentStage, may_keep: np.ndarray, barred: np.ndarray
    ) -> None:
        """Cut a run where it came first in a document that may keep it; else, of all that came
        first in the same place, where another document has it before."""
        found, title = self._found[stage.unique_name], stage.unique_name
        document, of = found["document"], found["of"]
        use = (may_keep | barred)[document]
        rest = np.flatnonzero(use & ~may_keep[of])
        keys = (found["begin"], document, -found["rank"][document], of)
        rest = rest[np.lexsort([key[rest] for key in keys])]
        runs = [found[name][rest] for name in ("document", "begin", "end", "last", "of", "at")]
        parts = match_earlier_copies(np.stack(runs, 1), may_keep[document[rest]])
        runs = [found[name] for name in ("document", "begin", "end", "of", "at")]
        parts = np.concatenate([np.stack(runs, 1)[use & may_keep[of]], parts])
        # Places are document << 32 | character. A part is cut as far as nothing is cut where it
        # stays, so that it stands there in one piece.
        start, kept = parts[:, 0] << 32 | parts[:, 1], parts[:, 3] << 32 | parts[:, 4]
        stop = start + parts[:, 2] - parts[:, 1]
        gone = merge_spans(start, stop)
        low = np.searchsorted(gone[1], kept, "right")
        number = np.searchsorted(gone[0], kept + stop - start) - low + 1
        which = np.repeat(np.arange(len(parts)), number)
        gap = np.arange(len(which)) - np.repeat(np.cumsum(number) - number, number) + low[which]
        first = np.maximum(kept[which], np.append(-1, gone[1])[gap])
        last = np.minimum((kept + stop - start)[which], np.append(gone[0], 2**62)[gap])
        shift = (start - kept)[which]
        some = first < last
        start, stop = (first + shift)[some], (last + shift)[some]
        order = np.lexsort((stop, start))
        self._cuts[f"{title}.cuts"] = start[order], stop[order]
        share = self._verdicts[f"{title}.cut_share"] = np.zeros(len(may_keep))
        starts, stops = merge_spans(start, stop)
        np.add.at(share, starts >> 32, stops - starts)
        share[found["some"]] /= found["size"]

    def write(self, folder: os.PathLike, names: Sequence[str]) -> None:
        """Write the settled labels, as files of `folder` below the corpus."""
        types = [(name, _TYPES.get(name.rpartition(".")[2], pa.float64())) for name in names]
        schema = pa.schema(types)
        groups, documents = self._add_verdicts("labels"), slice(0)
        for shard, stop in zip(self._corpus.shards, self._first[1:], strict=True):
            with ShardWriter(shard.path(str(folder)), schema) as writer:
                while documents.stop < stop:
                    documents, labelled = next(groups)
                    arrays = [
                        self._spans(name, documents)
                        if name in self._cuts
                        else labelled.column(name)
                        for name in names
                    ]
                    writer.write_row_group(pa.RecordBatch.from_arrays(arrays, schema=schema))

    def _spans(self, name: str, documents: slice) -> pa.Array:
        start, stop = self._cuts[name]
        numbers = np.arange(documents.start, documents.stop + 1)
        offsets = np.searchsorted(start, numbers << 32)
        part = slice(offsets[0], offsets[-1])
        fields = [pa.array(each[part] & (2**32 - 1), pa.int32()) for each in (start, stop)]
        spans = pa.StructArray.from_arrays(fields, fields=list(CUTS.value_type))
        return pa.ListArray.from_arrays((offsets - offsets[0]).astype(np.int32), spans)
