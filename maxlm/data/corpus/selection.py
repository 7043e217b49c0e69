"""A corpus as a source of text: what its labels' rules keep."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.data.corpus.config import FilesConfig, SourceConfig
from maxlm.data.corpus.files import SourceFile
from maxlm.data.corpus.opened import Corpus, read_kept, read_recipe
from maxlm.data.corpus.recipe import Rules, texts_of
from maxlm.data.corpus.shards import DOCUMENTS, Shard
from maxlm.data.corpus.slices import FileSlice
from maxlm.data.corpus.streams import open_stream
from maxlm.data.work.paths import file_sha256


def corpus_files(folder: Path, config: FilesConfig) -> list[SourceFile]:
    """The shards of the corpus in `folder`, as files.

    Raises:
        MaxlmError: the corpus is not finished, or a rule is wrong.
    """
    corpus = Corpus.open(folder)
    rules = _rules(corpus, config)
    labels = [name for rule in rules.keep.values() for name in rule.names] + list(rules.cut)
    stages = {label.rpartition(".")[0] for label in labels} - {""} | set(texts_of(corpus.recipe))
    stages = [DOCUMENTS, *sorted(stages - {DOCUMENTS})]
    digests = [corpus.manifest(stage).get("shards_sha256", {}) for stage in stages]
    return [
        SourceFile(
            path=(path := shard.path(DOCUMENTS)),
            name=f"{folder}/{shard.name}",
            format="corpus",
            compression="none",
            size=path.stat().st_size,
            labels=tuple(shard.path(stage) for stage in stages[1:]),
            digests=tuple(each.get(shard.name) for each in digests),
        )
        for shard in corpus.shards
    ]


def selection(config: SourceConfig, files: Iterable[SourceFile]) -> str:
    """The rules that decide what is taken from the corpora among a source's files, as text."""
    found = []
    for folder in dict.fromkeys(_home(file) for file in files if file.format == "corpus"):
        rules = _rules(Corpus.open(folder), config)
        keep = {name: rule.text for name, rule in rules.keep.items()}
        found.append({"keep": keep, "cut": rules.cut})
    return json.dumps(found)


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
    folder, name = _home(part.file), part.file.path.stem
    # Its manifests were looked at by `corpus_files`; once for each shard would be quadratic.
    corpus = Corpus(folder, read_recipe(folder))
    rules = _rules(corpus, config)
    shard = Shard(folder, name, texts_of(corpus.recipe))
    for document_id, text in read_kept(shard, rules):
        yield document_id, None if text is None else text.encode()


def _home(shard: SourceFile) -> Path:
    return shard.path.parents[1]


def _rules(corpus: Corpus, config: FilesConfig) -> Rules:
    chosen = config if isinstance(config, SourceConfig) else None
    return corpus.rules(chosen and chosen.keep, chosen and chosen.cut)
