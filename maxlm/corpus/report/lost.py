"""Text lost: what rules drop as a duplicate, or cut as a repeat, and no kept document has.

It is looked for in the texts, however duplicates were settled: of a dropped document its word
n-grams among those of all kept ones, of a passage its words, byte for byte, in what stays of them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from maxlm.corpus.dedup.columns import concatenate, read_columns, write_columns
from maxlm.corpus.dedup.minhash import make_shingle_set
from maxlm.corpus.dedup.windows import concatenate_texts, find_words, get_code_points, hash_windows
from maxlm.corpus.opened import OpenCorpus, mark_kept, read_kept
from maxlm.corpus.recipe import Rules, find_comparing_stages
from maxlm.corpus.settling import (
    Compared,
    add_verdict_columns,
    list_rule_input_columns,
    settle_duplicates,
)
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import JobRunner
from maxlm.runtime.executor import Executor
from maxlm.runtime.files import replace_file
from maxlm.runtime.progress import Progress, ignore_progress

_MOST = 100_000  # Documents, and passages, that are looked for.
_HASHES = (64, 16)  # Of a document, and of a passage: the smallest, which are a fair sample.
_DOUBT = 0.25  # Four standard deviations and more of a share of so many n-grams.
_BATCH = 256

Hashes = tuple[np.ndarray, np.ndarray]
"""Hashes (uint64), and which text each is of (int64, rising)."""


@dataclass(frozen=True)
class LostText:
    """How many of what is dropped or cut are in no kept document."""

    documents: int = 0
    passages: int = 0
    documents_dropped: int = 0
    passages_cut: int = 0

    def __str__(self) -> str:
        return (
            f"text lost: {self.documents + self.passages:,} ({self.documents:,} of "
            f"{self.documents_dropped:,} documents dropped as duplicates, {self.passages:,} of "
            f"{self.passages_cut:,} passages cut)"
        )


def count_lost(
    corpus: OpenCorpus, rules: Rules, engine: Executor, progress: Progress = ignore_progress
) -> LostText:
    """Look in what the rules keep for what they drop as duplicates and cut as repeats, up to
    100,000 of each. The count lies beside the settled labels, and is made once for the same rules.
    """
    stages = find_comparing_stages(corpus.recipe, rules)
    shards = settle_duplicates(corpus, rules, progress)
    if not stages or not shards:
        return LostText()
    home = corpus.folder / shards[0].settled_folder
    path = home / "lost.json"
    if path.exists():
        return LostText(**json.loads(path.read_text()))
    run = JobRunner("text lost", engine, progress)
    # Words of a document's n-gram, and of a passage's window.
    sizes = (
        min((getattr(stage, "ngram", 5) for stage, _ in stages), default=5),
        min((getattr(stage, "min_tokens", 50) for stage, _ in stages), default=50),
    )
    list_removed = partial(_list_removed, rules, stages, -(-_MOST // len(shards)), sizes)
    removed = run(list_removed, shards, "dropped")
    alike = min((getattr(stage, "jaccard", 1.0) for stage, _ in stages), default=1.0)
    lost, whole = [], Rules(rules.keep, ())  # Documents count with what is cut of them.
    looks = ((whole, _hash_grams, alike - _DOUBT), (rules, _hash_windows, 1.0))
    for kind, (kept, hash_texts, share) in enumerate(looks):
        wanted = np.unique(concatenate([found[kind][0] for found, _ in removed], np.uint64))
        file = home / f"hashes-{kind}.arrow"
        write_columns(file, {"hash": wanted})
        find = partial(_find_hashes, kept, file, hash_texts, sizes[kind])
        seen = np.any([np.zeros(len(wanted), np.bool_), *run(find, shards, "kept")], axis=0)
        there = [
            np.bincount(text, seen[np.searchsorted(wanted, hashes)]) < share * np.bincount(text)
            for hashes, text in (found[kind] for found, _ in removed)
        ]
        lost.append(int(sum(map(np.count_nonzero, there))))
    total = LostText(*lost, *(sum(counts[kind] for _, counts in removed) for kind in range(2)))
    with replace_file(path) as new:
        new.write_text(json.dumps(asdict(total)))
    return total


def _list_removed(
    rules: Rules, stages: Compared, most: int, sizes: tuple[int, int], shard: StageShardView
) -> tuple[tuple[Hashes, Hashes], list[int]]:
    """Hashes of dropped documents and of cut passages, and how many there are of each."""
    columns = ["text", *list_rule_input_columns(rules, stages)]
    cuts = {name for name in shard.settled if name.endswith(".cuts")}
    others = sorted({*rules.cut} - cuts)
    documents, passages, counts = [], [], [0, 0]
    for table in shard.groups([*columns, *shard.settled, *others]):
        # By no verdict, by those on whole documents, and by all.
        none = some = add_verdict_columns(table.select(columns), stages)
        for name in shard.settled:
            if name.endswith((".duplicate", ".jaccard")):
                place = some.schema.get_field_index(name)
                some = some.set_column(place, name, table.column(name))
        unruled, single, stays = (mark_kept(each, rules) for each in (none, some, table))
        texts = table.column("text").to_pylist()
        documents += [texts[row] for row in np.flatnonzero(unruled & ~single & ~stays)]
        spans = {name: table.column(name).to_pylist() for name in {*cuts, *others}}
        for row in np.flatnonzero(single):
            other = [span for name in others for span in spans[name][row] or ()]
            for name in cuts & {*rules.cut} if stays[row] else cuts:
                for start, end in (span.values() for span in spans[name][row] or ()):
                    # But for what is cut for another reason.
                    if not any(o["start"] < end and start < o["end"] for o in other):
                        passages.append(texts[row][start:end])
        for kind, found in enumerate((documents, passages)):
            counts[kind] += max(0, len(found) - most)
            del found[most:]
    counts = [counts[0] + len(documents), counts[1] + len(passages)]
    sample = _sample(_hash_grams(documents, sizes[0]), _HASHES[0])
    return (sample, _sample(_hash_windows(passages, sizes[1]), _HASHES[1])), counts


def _sample(hashes: Hashes, most: int) -> Hashes:
    value, text = (each[np.lexsort(hashes)] for each in hashes)
    few = np.arange(len(text)) - np.searchsorted(text, text) < most
    return value[few], text[few]


def _find_hashes(
    rules: Rules,
    file: Path,
    hash_texts: Callable[[Sequence[str], int], Hashes],
    size: int,
    shard: StageShardView,
) -> np.ndarray:
    """Which hashes of a file are those of kept texts: bool [hashes]."""
    wanted = read_columns(file)["hash"]
    seen = np.zeros(len(wanted), np.bool_)
    texts = (text for _, text in read_kept(shard, rules) if text)
    while len(wanted) and (batch := list(islice(texts, _BATCH))):
        hashes, _ = hash_texts(batch, size)
        place = np.searchsorted(wanted, hashes) % len(wanted)
        seen[place[wanted[place] == hashes]] = True
    return seen


def _hash_grams(texts: Sequence[str], size: int) -> Hashes:
    """Hashes the different word n-grams of texts, as `NearStage` does."""
    parts = [make_shingle_set(text, size) for text in texts]
    return concatenate(parts, np.uint64), np.repeat(np.arange(len(parts)), [*map(len, parts)])


def _hash_windows(texts: Sequence[str], size: int) -> Hashes:
    """Hashes the runs of `size` words of texts, as `SubstringStage` does; of a text of fewer words
    none."""
    text, offsets = concatenate_texts([get_code_points(each) for each in texts])
    starts, stops, first = find_words(text, offsets)
    hashes, begins = hash_windows(text, starts, stops, first, size)
    return hashes, np.searchsorted(offsets[1:], starts[begins], "right")
