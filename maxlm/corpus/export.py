"""Exporting what rules keep of a corpus, as Parquet or JSONL for other programs."""

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from maxlm.config import MaxlmError
from maxlm.corpus.opened import OpenCorpus, read_filtered_documents
from maxlm.corpus.recipe import FilterRules
from maxlm.corpus.report.summary import find_language_label
from maxlm.corpus.settling import resolve_duplicates_for_rules
from maxlm.corpus.shards import DOCUMENTS, StageShardView
from maxlm.corpus.stage import JobRunner
from maxlm.runtime.files import convert_write_errors, lock_folder
from maxlm.runtime.pool import Executor
from maxlm.runtime.progress import Progress, ignore_progress

ExportFormat = Literal["parquet", "jsonl"]
_COUNTS = ("documents", "text_bytes", "files", "dropped", "empty")
_MANIFEST = "export.json"
_FILE_BYTES = 256 << 20  # Of text.
_JOB_BYTES = 128 << 20  # Of the shards' files, which are compressed.
_GROUP_BYTES, _GROUP_ROWS = 16 << 20, 4096
_TYPES = {"text": pa.large_string()}


def export_corpus(
    corpus: OpenCorpus,
    rules: FilterRules,
    out: Path,
    format: ExportFormat,
    engine: Executor,
    *,
    force: bool = False,
    progress: Progress = ignore_progress,
) -> Counter[str]:
    """Write the documents that `rules` keep to files of about 256 MB of text in the folder `out`.

    They are those that a token store is built from, in the same order, each with `id`, `source`,
    `url`, `meta` (JSON), `language` where a stage tells it, and `text`. Parquet is compressed with
    zstd, JSONL with gzip. `out` appears when complete, with an `export.json` of rules and counts.

    Args:
        force: replace an earlier export.

    Returns:
        Numbers of `documents`, `text_bytes` and `files` written, of documents `dropped` by rules
        and of those `empty` after cuts.

    Raises:
        MaxlmError: `out` exists, and is no export or `force` is not given; a full disk.
    """
    out = out.absolute()
    _check_replaceable(out, force)
    language = find_language_label(corpus)
    columns = ("id", "source", "url", "meta", *([language] if language else []))
    building = out.with_name(f".{out.name}.exporting")
    with lock_folder(building), convert_write_errors(out):
        new = building / "new"
        shutil.rmtree(new, ignore_errors=True)  # Of a killed export.
        new.mkdir()
        shards = resolve_duplicates_for_rules(corpus, rules, progress)
        ends = accumulate(shard.path(DOCUMENTS).stat().st_size for shard in shards)
        parts = groupby(zip(ends, shards, strict=True), lambda each: each[0] // _JOB_BYTES)
        jobs = [
            (str(new / f"{number:06d}"), [shard for _, shard in part])
            for number, (_, part) in enumerate(parts)
        ]
        counts = Counter[str](dict.fromkeys(_COUNTS, 0))
        write = partial(_export_shards, rules, columns, format)
        for each in JobRunner("export", engine, progress)(write, jobs):
            counts.update(each)
        keep = {name: rule.text for name, rule in rules.keep.items()}
        about = {"corpus": str(corpus.folder), "format": format, "keep": keep, "cut": rules.cut}
        (new / _MANIFEST).write_text(json.dumps(about | counts, indent=1))
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


def _export_shards(
    rules: FilterRules,
    columns: Sequence[str],
    format: ExportFormat,
    part: tuple[str, list[StageShardView]],
) -> Counter[str]:
    """Write the documents of some shards to files whose names begin with the given path."""
    start, shards = part
    counts: Counter[str] = Counter()
    file, size = None, 0
    with ExitStack() as open_files:
        for rows, length in _read_groups(rules, columns, shards, counts):
            if file is None:
                path, size = f"{start}-{counts['files']:03d}.{format}", 0
                counts["files"] += 1
                if format == "parquet":
                    schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in rows[0]])
                    new = pq.ParquetWriter(path, schema, compression="zstd")
                    file = open_files.enter_context(new)
                else:
                    file = open_files.enter_context(gzip.open(f"{path}.gz", "wt", 6, "utf-8"))
            if isinstance(file, pq.ParquetWriter):
                file.write_batch(pa.RecordBatch.from_pylist(rows, schema=file.schema))
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            size += length
            if size >= _FILE_BYTES:
                open_files.close()
                file = None
    return counts


def _read_groups(
    rules: FilterRules,
    columns: Sequence[str],
    shards: Sequence[StageShardView],
    counts: Counter[str],
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Some documents at a time, and the bytes of their texts; adds up `counts` on the way."""
    names = [name if "." not in name else "language" for name in columns]
    rows, size = [], 0
    kept = chain.from_iterable(read_filtered_documents(shard, rules, columns) for shard in shards)
    for values, text in chain(kept, [((), None)]):
        if rows and (not values or size >= _GROUP_BYTES or len(rows) == _GROUP_ROWS):
            counts.update(documents=len(rows), text_bytes=size)
            yield rows, size
            rows, size = [], 0
        if text:
            rows.append(dict(zip(names, values, strict=True)) | {"text": text})
            size += len(text.encode())
        elif values:
            counts["dropped" if text is None else "empty"] += 1
