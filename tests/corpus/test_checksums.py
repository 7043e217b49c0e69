"""A shard that is not the one a run wrote is found, named, and made again."""

import json
import os

import pytest

from maxlm.cli.main import main
from maxlm.corpus.opened import OpenCorpus
from maxlm.corpus.run import run_recipe
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents
from tests.corpus.corpora import recipe
from tests.errors import message

REPAIR = (
    "delete each such file and run the corpus's recipe again, which makes them anew"
)


@pytest.fixture
def settings(tmp_path):
    """Two files of as many texts, so that their shards may stand for each other."""
    sources = []
    for name in ("first", "one more"):
        lines = [
            json.dumps({"text": f"the {name} text of {i % 10}", "id": f"{i}"})
            for i in range(30)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        documents = [str(tmp_path / f"{name}.jsonl")]
        sources.append({"name": name.replace(" ", "-"), "documents": documents})
    return {"sources": sources, "stages": [{"stage": "heuristics"}], "keep": {}}


@pytest.fixture
def corpus(tmp_path, settings):
    return run_recipe(recipe(tmp_path, tmp_path / "corpus", **settings))


def read_texts(corpus):
    source = SourceConfig(documents=(str(corpus),))
    return [document.text for document in read_documents(source)]


def list_shards(corpus, stage):
    return [shard.path(stage) for shard in OpenCorpus.open(corpus).shards]


def exchange(first, second):
    aside = first.with_name("aside")
    os.rename(first, aside)
    os.rename(second, first)
    os.rename(aside, second)


def print_verify(corpus, capfd):
    code = main(["corpus", "verify", str(corpus)])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("stage", ["documents", "heuristics"])
def test_exchanged_shards_are_found_and_repaired(
    tmp_path, corpus, settings, capfd, stage
):
    texts = read_texts(corpus)
    code, out, error = print_verify(corpus, capfd)
    assert (code, out, error) == (0, "2 shards of 2 stages: all is well\n", "")
    first, second = sorted(list_shards(corpus, stage))
    exchange(first, second)
    code, out, error = print_verify(corpus, capfd)
    assert (code, out) == (2, "")
    changed = f"this file has changed since it was written (and 1 other: {second.name})"
    assert error == f"error: {first}: {changed}; {REPAIR}\n"
    if stage == "documents":
        error_message = message(lambda: read_texts(corpus))
        assert (
            "this file has changed since maxlm corpus run wrote it; delete"
            in error_message
        )
    first.unlink()
    second.unlink()
    run_recipe(recipe(tmp_path, corpus, **settings))
    assert print_verify(corpus, capfd)[0] == 0
    assert read_texts(corpus) == texts


def test_one_bit_is_found_also_after_more_files_have_come(
    tmp_path, corpus, settings, capfd
):
    """Adding a source makes a new list; damage of before must not become what it
    says."""
    path = list_shards(corpus, "documents")[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    state = path.stat()
    # In place, as a disk would: the same file to its file system.
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    expected = f"error: {path}: this file has changed since it was written; {REPAIR}\n"
    assert print_verify(corpus, capfd)[2] == expected
    (tmp_path / "third.jsonl").write_text(json.dumps({"text": "a third", "id": "x"}))
    third = {"name": "third", "documents": [str(tmp_path / "third.jsonl")]}
    settings["sources"].append(third)
    settings["stages"] = []
    run_recipe(recipe(tmp_path, corpus, **settings))
    assert len(list_shards(corpus, "documents")) == 3
    assert print_verify(corpus, capfd)[2] == expected


def test_a_corpus_without_checksums_says_so_once_and_gets_them(
    tmp_path, corpus, settings, capfd
):
    for stage in ("documents", "heuristics"):
        (corpus / stage / "checksums.sha256").unlink()
        path = corpus / stage / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["checksums_sha256"], manifest["sha256"]
        path.write_text(json.dumps(manifest))
    before = read_texts(corpus)
    code, out, error = print_verify(corpus, capfd)
    assert (code, out) == (0, "2 shards of 2 stages: all is well\n")
    assert error.count("\n") == error.count("without checksums") == 2
    run_recipe(recipe(tmp_path, corpus, **settings))
    assert print_verify(corpus, capfd)[2] == ""
    assert read_texts(corpus) == before
