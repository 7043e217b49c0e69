"""Entering the texts that a corpus keeps into the index of texts that corpora have."""

from collections.abc import Sequence
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


def enter_kept_texts(folder: Path, executor: TaskExecutor, progress: Progress) -> None:
    """Enters the texts that a finished corpus's recipe keeps into the indexes that its
    stages name.

    Only these: a text that the rules drop is in no corpus, and another one may keep it.
    """
    corpus = OpenCorpus.open(folder)
    stages = [stage for stage in corpus.recipe.stages if isinstance(stage, ExactStage)]
    for stage in stages:
        if stage.index is None:
            continue
        rules = corpus.resolve_rules()
        position = corpus.recipe.stages.index(stage)
        text_stages = get_text_stages(corpus.recipe.stages[:position])
        job = partial(_digest_kept_texts, stage, rules, text_stages)
        shards = corpus.settle_rules(rules, progress)
        digests = JobRunner(f"{stage.unique_name}: index", executor, progress)(
            job, shards
        )
        _, entry = stage.reserve_entry(folder)
        write_index_entry(entry, np.concatenate([np.empty(0, DIGEST), *digests]))


def _digest_kept_texts(
    stage: ExactStage,
    rules: FilterRules,
    text_stages: Sequence[str],
    shard: StageShardView,
) -> np.ndarray:
    """Computes the digests of the texts of a shard's kept documents, as the stage read
    them."""
    digests = bytearray()
    texts = replace(shard, text_stages=tuple(text_stages)).read_row_groups(["text"])
    tables = shard.read_row_groups(list(dict.fromkeys(["text", *rules.label_names])))
    for table, read in zip(tables, texts, strict=True):
        kept_texts = read.filter(pa.array(mark_kept(table, rules))).column("text")
        for text in kept_texts.drop_null():
            digests += stage.compute_digest(text.as_py())
    return np.frombuffer(bytes(digests), DIGEST)
