"""Readers of the formats that `maxlm.data.documents.files` finds here: corpora and crawls."""

# pyarrow.compute makes its functions at run time, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from maxlm.config import MaxlmError
from maxlm.corpus.opened import OpenCorpus, read_filtered_documents
from maxlm.corpus.recipe import FilterRules, get_text_stages
from maxlm.corpus.shards import DOCUMENTS, StageShardView
from maxlm.data.documents.config import FilesConfig, SourceConfig
from maxlm.data.documents.document import Document, FileSlice, SkipReason, SourceFile


@dataclass(frozen=True)
class FilteredShard:
    """A shard of a corpus and the rules that say what is taken from it."""

    shard: StageShardView
    rules: FilterRules


class CorpusReader:
    """Reads a corpus as a source of text: the documents that its labels' rules keep."""

    def list_files(self, folder: Path, source: FilesConfig) -> list[SourceFile]:
        """Lists the shards of the corpus in `folder`, as files."""
        corpus = OpenCorpus.open(folder)
        chosen = source if isinstance(source, SourceConfig) else None
        rules = corpus.resolve_rules(chosen and chosen.keep, chosen and chosen.cut)
        texts, files = get_text_stages(corpus.recipe), []
        for shard in corpus.shards:
            labels = [*rules.label_names, *rules.cut]
            stages = {stage for label in labels for stage, _ in shard.find_column_sources(label)}
            stages = [DOCUMENTS, *sorted(stages.union(texts) - {DOCUMENTS})]
            path = shard.path(DOCUMENTS)
            state = path.stat()
            files.append(
                SourceFile(
                    path=path,
                    name=f"{folder}/{shard.name}",
                    format="corpus",
                    compression="none",
                    size=state.st_size,
                    mtime_ns=state.st_mtime_ns,
                    extra_paths=tuple(shard.path(s) for s in stages[1:]),
                    details=FilteredShard(shard, rules),
                )
            )
        return files

    def read(self, source: SourceConfig, part: FileSlice) -> Iterator[Document | SkipReason]:
        """Reads the documents of a shard."""
        kept: FilteredShard = part.file.details
        for (document_id,), text in read_filtered_documents(kept.shard, kept.rules):
            if text is None:
                yield SkipReason.RULE
            else:
                yield Document(document_id, text.encode()) if text else SkipReason.EMPTY

    def describe_filter_rules(self, files: Iterable[SourceFile]) -> str:
        """Describes the rules that decide what is taken from corpora, as JSON."""
        rules = {file.details.shard.folder: file.details.rules for file in files}
        return json.dumps(
            [
                {"keep": {name: rule.text for name, rule in each.keep.items()}, "cut": each.cut}
                for each in rules.values()
            ]
        )


class UnsupportedCrawlReader:
    """Refuses crawls: their pages are texts only after a corpus is made of them."""

    def read(self, source: SourceConfig, part: FileSlice) -> Iterator[Document | SkipReason]:
        """Raises a MaxlmError that says so."""
        fix = "make a corpus of it with maxlm corpus run, and name that corpus's folder here"
        raise MaxlmError("a crawl holds pages, not texts", where=str(part.file.path), fix=fix)


CORPUS_READER, CRAWL_READER = CorpusReader(), UnsupportedCrawlReader()


def find_document(corpus: OpenCorpus, document_id: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """Finds a document by its id; raises MaxlmError if there is none.

    Returns:
        Its newest text, columns and labels, by name; whether it fulfils each rule, by the rule's
        name.
    """
    columns = ["id", "source", "url", "meta", "text", *corpus.labels]
    for shard in corpus.shards:
        for group, ids in enumerate(shard.read_row_groups(["id"])):
            if (row := pc.index(ids.column("id"), document_id).as_py()) >= 0:
                tables = shard.read_row_groups(list(dict.fromkeys(columns)))
                table = next(islice(tables, group, None)).slice(row, 1)
                keep = corpus.resolve_rules().keep.items()
                passed = {name: bool(rule.evaluate(table)[0]) for name, rule in keep}
                return table.to_pylist()[0], passed
    fix = "ids are in the report, or in the column id of documents/*.parquet"
    raise MaxlmError(f"there is no document {document_id!r}", where=str(corpus.folder), fix=fix)
