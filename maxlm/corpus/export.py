"""Exporting what rules keep of a corpus, as Parquet or JSONL for other programs."""

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from maxlm.config import MaxlmError
from maxlm.corpus.opened import OpenCorpus, read_filtered_documents
from maxlm.corpus.recipe import FilterRules
from maxlm.corpus.report import find_language_label
from maxlm.corpus.shards import StageShardView
from maxlm.corpus.stage import JobRunner
from maxlm.data.batching import batch_by_size
from maxlm.runtime.executor import TaskExecutor
from maxlm.runtime.files import convert_write_errors, lock_folder, replace_file
from maxlm.runtime.progress import Progress, ignore_progress

_COUNTS = ("documents", "text_bytes", "files", "dropped", "empty")
_MANIFEST = "export.json"
_GROUP_CHARS = 16 << 20
_GROUP_ROWS = 4096


def export_corpus(
    corpus: OpenCorpus,
    rules: FilterRules,
    out: Path,
    format: Literal["parquet", "jsonl"],
    executor: TaskExecutor,
    *,
    force: bool = False,
    progress: Progress = ignore_progress,
) -> Counter[str]:
    """Write the documents that `rules` keep to files in the folder `out`, one of each
    shard.

    They are those that a token store is built from, in the same order, each with `id`,
    `source`, `url`, `meta` (JSON), `language` where a stage tells it, and `text`.
    Parquet is compressed with zstd, JSONL with gzip. `out` appears when complete, with
    an `export.json` of rules and counts. Raises MaxlmError: `out` exists, and is no
    export or `force` is not given; a full disk.

    Args:
        force: replace an earlier export.

    Returns:
        Numbers of `documents`, `text_bytes` and `files` written, of documents `dropped`
        by rules and of those `empty` after cuts.
    """
    out = out.absolute()
    _check_replaceable(out, force)
    language = find_language_label(corpus)
    columns = ("id", "source", "url", "meta", *([language] if language else []))
    shards = corpus.settle_rules(rules, progress)
    building = out.with_name(f".{out.name}.exporting")
    with lock_folder(building), convert_write_errors(out):
        new = building / "new"
        shutil.rmtree(new, ignore_errors=True)  # Of a killed export.
        new.mkdir()
        counts = Counter[str](dict.fromkeys(_COUNTS, 0))
        write = partial(_export_shard, rules, columns, format, new)
        executor.require_on_workers(building, ())
        for each in JobRunner("export", executor, progress)(
            write, list(enumerate(shards))
        ):
            counts.update(each)
        about = (
            {"corpus": str(corpus.folder), "format": format} | rules.describe() | counts
        )
        (new / _MANIFEST).write_text(json.dumps(about, indent=1))
        if out.exists():
            shutil.rmtree(out)
        os.rename(new, out)
        shutil.rmtree(building)
    return counts


def _check_replaceable(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / _MANIFEST).is_file():
        fix = "choose another folder or remove it"
        raise MaxlmError("this exists and is not an export", where=str(out), fix=fix)
    if not force:
        fix = "choose another folder, or replace it with --force (force=True)"
        raise MaxlmError("there is an export here", where=str(out), fix=fix)


def _export_shard(
    rules: FilterRules,
    columns: Sequence[str],
    format: str,
    folder: Path,
    part: tuple[int, StageShardView],
) -> Counter[str]:
    number, shard = part
    counts: Counter[str] = Counter()
    names = [name if "." not in name else "language" for name in columns]
    schema = pa.schema(
        [*((n, pa.string()) for n in names), ("text", pa.large_string())]
    )

    def read_rows() -> Iterator[dict[str, Any]]:
        for values, text in read_filtered_documents(shard, rules, columns):
            if text:
                counts.update(documents=1, text_bytes=len(text.encode()))
                yield dict(zip(names, values, strict=True)) | {"text": text}
            else:
                counts["dropped" if text is None else "empty"] += 1

    path = folder / f"{number:06d}.{format}"
    if format == "parquet":
        groups = batch_by_size(
            read_rows(), lambda row: len(row["text"]), _GROUP_CHARS, _GROUP_ROWS
        )
        with (
            replace_file(path) as new,
            pq.ParquetWriter(new, schema, compression="zstd") as file,
        ):
            for rows in groups:
                file.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    else:
        path = path.with_name(f"{path.name}.gz")
        with (
            replace_file(path) as new,
            new.open("wb") as raw,
            # Neither a name nor a time in the header: the same documents are the same
            # bytes.
            gzip.GzipFile("", "wb", 6, raw, mtime=0) as file,
        ):
            for row in read_rows():
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    if counts["documents"]:
        counts["files"] = 1
    else:
        path.unlink()
    return counts
