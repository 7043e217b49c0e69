"""Text lost: what rules drop as a duplicate, or cut as a repeat, and no kept document has.

It is looked for in the texts, however duplicates were settled: of each dropped document, and of
each passage that is cut, some word n-grams among those of all kept documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa

from maxlm.corpus.dedup.columns import concatenate
from maxlm.corpus.dedup.minhash import hash_shingles, hash_words, make_shingle_set
from maxlm.corpus.opened import OpenCorpus, mark_kept, remove_cut_spans
from maxlm.corpus.recipe import FilterRules, find_dedup_stages
from maxlm.corpus.settling import (
    DedupStages,
    add_verdict_columns,
    list_rule_columns,
    resolve_duplicates_for_rules,
)
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import JobRunner
from maxlm.runtime.pool import Executor
from maxlm.runtime.progress import Progress, ignore_progress

_MOST = 10_000  # Documents, and passages, that are looked for.
_HASHES = 64  # Of each: its smallest, which are a fair sample.
_DOUBT = 0.25  # Four standard deviations of a share of so many n-grams.
_JOBS = 128


@dataclass(frozen=True)
class LostText:
    """Counts of dropped documents and cut passages, and of those that are in no kept document."""

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


def estimate_text_lost_to_dedup(
    corpus: OpenCorpus, rules: FilterRules, engine: Executor, progress: Progress = ignore_progress
) -> LostText:
    """Look for some 10,000 dropped duplicates and as many cut passages in what the rules keep."""
    stages = find_dedup_stages(corpus.recipe, rules)
    shards = resolve_duplicates_for_rules(corpus, rules, progress)
    if not stages or not shards:
        return LostText()
    size = min(getattr(stage, "ngram", 5) for stage, _ in stages)
    alike = min(getattr(stage, "jaccard", 1.0) for stage, _ in stages)
    run = JobRunner("text lost", engine, progress)
    sample = partial(_sample_removed, rules, stages, size, -(-_MOST // len(shards)))
    samples = [*zip(*run(sample, shards, "dropped"), strict=True)]  # By kind, then by shard.
    texts = [[hashes for _, some in kind for hashes in some] for kind in samples]
    wanted = np.unique(concatenate([*chain(*texts)], np.uint64))
    # What is cut for another reason is no repeat.
    cut = {label for stage, _ in stages for label in stage.verdict_labels} & {*rules.cut}
    find = partial(_find_hashes, FilterRules(rules.keep, tuple(cut)), wanted, size)
    seen = np.any(run(find, [shards[i::_JOBS] for i in range(min(_JOBS, len(shards)))], "kept"), 0)
    lost = (
        sum(bool(found[np.searchsorted(wanted, hashes)].mean() < share) for hashes in some)
        for some, found, share in zip(texts, seen, (alike - _DOUBT, 1.0), strict=True)
    )
    return LostText(*lost, *(sum(count for count, _ in kind) for kind in samples))


def _sample_removed(
    rules: FilterRules, stages: DedupStages, size: int, most: int, shard: StageShardView
) -> list[tuple[int, list[np.ndarray]]]:
    """Counts dropped documents and cut passages, and hashes the first of each."""
    inputs, counts, samples = ["text", *list_rule_columns(rules, stages)], [0, 0], ([], [])
    verdicts = [f"{stage.unique_name}.{label}" for stage, _ in stages for label in stage.verdicts]
    for table in shard.read_row_groups([*dict.fromkeys([*inputs, *verdicts])]):
        # By no verdict, by those on whole documents, and by all.
        none = add_verdict_columns(table.select(inputs), stages, {})
        whole = {name for name in verdicts if name.endswith((".duplicate", ".jaccard"))}
        columns = {n: (table if n in whole else none).column(n) for n in none.schema.names}
        some = pa.RecordBatch.from_pydict(columns)
        unruled, single, kept = (mark_kept(each, rules) for each in (none, some, table))
        texts = table.column("text").to_pylist()
        documents = [texts[row] for row in np.flatnonzero(unruled & ~single)]
        passages = [
            texts[row][span["start"] : span["end"]]
            for name in verdicts
            if name.endswith(".cuts")
            for row in np.flatnonzero(single if name in rules.cut else single & ~kept)
            for span in table.column(name)[int(row)].as_py() or ()
        ]
        for kind, (found, least) in enumerate(((documents, 1), (passages, size))):
            counts[kind] += len(found)
            for words in map(hash_words, found[: most - len(samples[kind])]):
                if len(words) >= least:
                    samples[kind].append(np.unique(hash_shingles(words, size))[:_HASHES])
    return [*zip(counts, samples, strict=True)]


def _find_hashes(
    rules: FilterRules, wanted: np.ndarray, size: int, shards: Sequence[StageShardView]
) -> np.ndarray:
    """Marks hashes found in kept documents, and in what stays of them: bool [2, hashes]."""
    seen = np.zeros((2, len(wanted)), np.bool_)
    columns = [*dict.fromkeys(["text", *rules.label_names, *rules.cut])]
    for table in chain.from_iterable(shard.read_row_groups(columns) for shard in shards):
        kept = table.filter(pa.array(mark_kept(table, rules)))
        texts = kept.column("text").to_pylist()
        whole = [make_shingle_set(text, size) for text in texts]
        rests = zip(texts, whole, remove_cut_spans(kept, rules), strict=True)
        stays = [a if rest == text else make_shingle_set(rest, size) for text, a, rest in rests]
        for mine, hashes in zip(seen, (whole, stays), strict=True):
            mine |= np.isin(wanted, concatenate(hashes, np.uint64))
    return seen
