"""Entering the texts that a corpus keeps into the index of texts that corpora have."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from maxlm.corpus.dedup.text_index import DIGEST, write_index_entry
from maxlm.corpus.opened import OpenCorpus, mark_kept
from maxlm.corpus.recipe import FilterRules, get_text_stages
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import JobRunner
from maxlm.corpus.stages.exact import ExactStage
from maxlm.runtime.executor import TaskExecutor
from maxlm.runtime.progress import Progress


def index_kept_texts(folder: Path, executor: TaskExecutor, progress: Progress) -> None:
    """Enters the texts that a finished corpus's recipe keeps into the indexes that its
    stages name.

    Only these: a text that the rules drop is in no corpus, and another one may keep it.
    """
    corpus = OpenCorpus.open(folder)
    for position, stage in enumerate(corpus.recipe.stages):
        if not isinstance(stage, ExactStage) or stage.index is None:
            continue
        rules = corpus.resolve_rules()
        text_stages = get_text_stages(corpus.recipe.stages[:position])
        shards = corpus.settle_rules(rules, progress)
        run = JobRunner(f"{stage.unique_name}: index", executor, progress)
        job = partial(_digest_kept_texts, stage, rules, text_stages)
        digests = [np.empty(0, DIGEST), *run(job, shards)]
        _, entry = stage.reserve_entry(folder)
        write_index_entry(entry, np.concatenate(digests))


def _digest_kept_texts(
    stage: ExactStage,
    rules: FilterRules,
    text_stages: tuple[str, ...],
    shard: StageShardView,
) -> np.ndarray:
    """Computes the digests of the texts of a shard's kept documents, as the stage read
    them."""
    # The newest text decides whether a document is kept; the stage may have read an
    # older one.
    names = list(dict.fromkeys(["text", *rules.label_names]))
    as_stage_read = replace(shard, text_stages=text_stages)
    row_groups = zip(
        shard.read_row_groups(names),
        as_stage_read.read_row_groups(["text"]),
        strict=True,
    )
    digests = bytearray()
    for table, texts in row_groups:
        is_kept = pa.array(mark_kept(table, rules))
        kept_texts = texts.filter(is_kept).column("text")
        for text in kept_texts.drop_null():
            digests += stage.compute_digest(text.as_py())
    return np.frombuffer(bytes(digests), DIGEST)
