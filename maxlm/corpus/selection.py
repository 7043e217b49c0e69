"""A corpus as a source of text: what its labels' rules keep."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.corpus.config import FilesConfig, SourceConfig
from maxlm.corpus.files import SourceFile
from maxlm.corpus.opened import Corpus, read_kept
from maxlm.corpus.recipe import Rules, texts_of
from maxlm.corpus.settling import settle_duplicates
from maxlm.corpus.shards import DOCUMENTS, Shard
from maxlm.corpus.slices import FileSlice
from maxlm.corpus.streams import open_stream
from maxlm.runtime.files import file_sha256


@dataclass(frozen=True)
class KeptShard:
    """A shard of a corpus and the rules that say what is taken from it."""

    shard: Shard
    rules: Rules


def read_corpus(config: SourceConfig, part: FileSlice) -> Iterator[tuple[str, bytes | None]]:
    """Yield (id, text) of each document of a shard; None for what the rules leave out.

    Raises:
        MaxlmError: one of its files is missing or damaged, or has changed since it was written.
    """
    for path, digest in zip((part.file.path, *part.file.labels), part.file.digests, strict=False):
        with open_stream(path, "none"):
            if digest and file_sha256(path) != digest:
                what = "this file has changed since maxlm corpus run wrote it"
                fix = "delete it and run the corpus's recipe again"
                raise MaxlmError(what, where=str(path), fix=fix)
    assert part.file.kept is not None, "a shard of a corpus"
    for (document_id,), text in read_kept(part.file.kept.shard, part.file.kept.rules):
        yield document_id, None if text is None else text.encode()


def corpus_files(folder: Path, config: FilesConfig) -> list[SourceFile]:
    """The shards of the corpus in `folder`, as files.

    Raises:
        MaxlmError: the corpus is not finished, or a rule is wrong.
    """
    corpus = Corpus.open(folder)
    chosen = config if isinstance(config, SourceConfig) else None
    rules = corpus.rules(chosen and chosen.keep, chosen and chosen.cut)
    labels = [name for rule in rules.keep.values() for name in rule.names] + list(rules.cut)
    files, digests = [], {}
    for shard in settle_duplicates(corpus, rules):
        path = shard.path(DOCUMENTS)
        stages = {stage for label in labels for stage, _ in shard.find_label_files(label)}
        stages = [DOCUMENTS, *sorted((stages | set(texts_of(corpus.recipe))) - {DOCUMENTS})]
        for stage in stages:
            if stage != shard.settled_folder and stage not in digests:
                digests[stage] = corpus.manifest(stage).get("shards_sha256", {})
        files.append(
            SourceFile(
                path=path,
                name=f"{folder}/{shard.name}",
                format="corpus",
                compression="none",
                size=path.stat().st_size,
                labels=tuple(shard.path(stage) for stage in stages[1:]),
                digests=tuple(digests.get(stage, {}).get(shard.name) for stage in stages),
                kept=KeptShard(shard, rules),
            )
        )
    return files


def selection(files: Iterable[SourceFile]) -> str:
    """The rules that decide what is taken from the corpora among a source's files, as text."""
    kept = {file.kept.shard.folder: file.kept.rules for file in files if file.kept}
    return json.dumps(
        [
            {"keep": {name: rule.text for name, rule in rules.keep.items()}, "cut": rules.cut}
            for rules in kept.values()
        ]
    )
