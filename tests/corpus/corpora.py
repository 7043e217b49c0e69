"""Corpora on disk for the tests of whole-corpus stages, without the runner."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from maxlm.corpus.recipe import RecipeConfig
from maxlm.corpus.shards import (
    DOCUMENT_SCHEMA,
    DOCUMENTS,
    StageShardView,
    open_shard_writer,
)
from maxlm.corpus.stage import (
    CrossDocumentStage,
    JobRunner,
    PerDocumentStage,
    ShardLabeller,
)
from maxlm.runtime.pool import WorkerPool
from maxlm.runtime.progress import ignore_progress


def make_corpus(
    folder: Path,
    documents: Sequence[Mapping[str, object] | str | None],
    shards: int = 3,
    rows_per_group: int = 7,
) -> list[StageShardView]:
    """Write documents to CORPUS/documents, in order, in shards of about the same size.

    A document is a text or some columns of `DOCUMENT_SCHEMA`; it gets the id "d0",
    "d1", ... and the source "made" unless it says otherwise.
    """
    rows = []
    for i, document in enumerate(documents):
        columns = document if isinstance(document, Mapping) else {"text": document}
        rows.append({"id": f"d{i}", "source": "made", **columns})
    shard_views = []
    for number in range(shards):
        start = number * len(rows) // shards
        end = (number + 1) * len(rows) // shards
        shard_rows = rows[start:end]
        shard = StageShardView(folder, f"{number:05d}")
        with open_shard_writer(shard.path(DOCUMENTS), DOCUMENT_SCHEMA) as writer:
            for first in range(0, len(shard_rows), rows_per_group):
                group = shard_rows[first : first + rows_per_group]
                batch = pa.RecordBatch.from_pylist(group, schema=DOCUMENT_SCHEMA)
                writer.write_row_group(batch)
        shard_views.append(shard)
    return shard_views


def add_labels(
    shards: Sequence[StageShardView], stage: str, **columns: pa.Array
) -> None:
    """Write labels of a made-up earlier stage; each column has a value for every
    document."""
    first = 0
    whole = pa.RecordBatch.from_pydict(columns)
    for shard in shards:
        with replace(shard, output_stage=stage).open_writer(whole.schema) as writer:
            for rows in shard.read_selected_rows(["id"]):
                writer.write_selected_rows(rows, whole.slice(first, rows.num_rows))
                first += rows.num_rows


def run_stage(
    stage: CrossDocumentStage | PerDocumentStage,
    shards: Sequence[StageShardView],
    scratch: Path,
    workers: int = 1,
) -> None:
    """Run one stage over the shards, as the runner would."""
    views = [replace(shard, output_stage=stage.unique_name) for shard in shards]
    if isinstance(stage, PerDocumentStage):
        for _ in map(ShardLabeller(stage), views):
            pass
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with WorkerPool(workers) as pool:
        stage.label(views, scratch, JobRunner(stage.unique_name, pool, ignore_progress))
    shutil.rmtree(scratch)


def labels(
    shards: Sequence[StageShardView],
    stage: CrossDocumentStage | PerDocumentStage,
    *more: str,
) -> pa.Table:
    """The ids of all documents and the stage's labels (and `more` columns), in
    order."""
    names = [
        "id",
        *(f"{stage.unique_name}.{name}" for name in stage.schema().names),
        *more,
    ]
    tables = []
    for shard in shards:
        batches = [rows.batch for rows in shard.read_selected_rows(names)]
        if batches:
            tables.append(pa.Table.from_batches(batches))
    column_names = [name.rpartition(".")[2] for name in names]
    return pa.concat_tables(tables).rename_columns(column_names)


def label_texts(stage: PerDocumentStage, *texts: str | None) -> list[dict]:
    """The labels of texts."""
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    labels = stage.make_batch_label_fn()(batch)
    assert labels.schema == stage.schema()
    return labels.to_pylist()


def recipe(crawl, out, **settings):
    """Stages that need no model but those in wheels, for tests of the runner."""
    return RecipeConfig.model_validate(
        {
            "out": str(out),
            "workers": 1,
            "shard_bytes": 16_000,
            "sources": [
                {"name": "web", "documents": [str(crawl / "web.jsonl")]},
                {"name": "books", "documents": [str(crawl / "books.jsonl")]},
            ],
            "stages": [
                {"stage": "language"},
                {"stage": "heuristics"},
                {"stage": "pii", "where": 'source == "books"'},
                {"stage": "exact"},
                {"stage": "near", "where": "not exact.duplicate"},
            ],
            "keep": {
                "long": "heuristics.words >= 20",
                "unique": "not exact.duplicate and not near.duplicate",
            },
        }
        | settings
    )
