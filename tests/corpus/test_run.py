"""A recipe's labels do not depend on how often it was stopped, nor on where it ran."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxlm.config import MaxlmError
from maxlm.corpus import run
from maxlm.corpus.opened import OpenCorpus, find_document
from maxlm.corpus.report import summarize_corpus, write_report
from maxlm.corpus.run import run_recipe
from maxlm.corpus.stages.pii import PiiStage
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents
from maxlm.data.store.build import build_store
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.runtime.pool import WorkerPool
from tests.corpus.corpora import recipe


def files(folder):
    """Every label file's bytes, by stage and shard."""
    paths = sorted(Path(folder).glob("*/*.parquet"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def list_times(folder):
    """When each shard of documents and labels was written, by path."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.parquet")}


def kept(folder, keep=None):
    source = SourceConfig(documents=(str(folder),), keep=keep)
    return [document.id for document in read_documents(source)]


def test_the_labels_are_what_they_say(whole, crawl):
    corpus = OpenCorpus.open(whole)
    assert len(corpus.shards) > 4
    raw = []
    for name in ("web.jsonl", "books.jsonl"):
        raw += map(json.loads, (crawl / name).read_text().splitlines())
    lengths = {row["id"]: len(row["text"].split()) for row in raw}
    taken = kept(whole)
    originals = set(taken)
    assert all(lengths[name] >= 20 for name in taken)
    copies = {f"web-{i}" for i in range(100, 110)}
    edited = {f"web-{i}" for i in range(150, 160) if lengths[f"web-{i}"] > 60}
    assert not originals & (copies | edited)
    # In the order of the sources.
    assert taken == [row["id"] for row in raw if row["id"] in originals]
    labels, verdicts = find_document(corpus, "web-105")
    assert labels["exact.duplicate"]
    assert labels["exact.of"] == "web-5"
    assert labels["near.duplicate"] is None
    assert labels["text"] == raw[105]["text"]
    assert verdicts == {"long": lengths["web-105"] >= 20, "unique": False}
    masked, _ = find_document(corpus, "books-0")
    assert "jean.dupont" not in masked["text"]
    assert masked["language.name"] == "fr"
    with pytest.raises(MaxlmError, match="no document 'web-9999'"):
        find_document(corpus, "web-9999")


def test_other_thresholds_need_no_pass(whole):
    before = list_times(whole)
    few = kept(whole, keep={"long": "heuristics.words >= 100"})
    assert 0 < len(few) < len(kept(whole)) < len(kept(whole, keep={}))
    assert len(kept(whole, keep={})) == 240
    message = r"keep\.long: .*did you mean heuristics\.words"
    with pytest.raises(MaxlmError, match=message):
        kept(whole, keep={"long": "heuristics.word >= 100"})
    assert list_times(whole) == before


def test_workers_do_not_matter(whole, crawl, tmp_path):
    run_recipe(recipe(crawl, tmp_path / "corpus", workers=2))
    assert files(tmp_path / "corpus") == files(whole)


def test_only_what_changed_is_done_again(crawl, tmp_path):
    out = tmp_path / "corpus"
    run_recipe(recipe(crawl, out))
    before = list_times(out)

    def redone():
        after = list_times(out)
        return {path.parent.name for path in after if before.get(path) != after[path]}

    run_recipe(recipe(crawl, out))
    assert redone() == set()
    unique = recipe(crawl, out).keep["unique"]
    run_recipe(recipe(crawl, out, keep={"url": "url is None", "unique": unique}))
    assert redone() == set()
    stages = list(recipe(crawl, out).model_dump()["stages"])
    stages[3] = {"stage": "exact", "keep_by": "heuristics.words"}
    run_recipe(recipe(crawl, out, stages=stages))
    assert redone() == {"exact"}  # Which copy is kept is not known when near runs.


def test_new_files_are_added_to_what_is_there(crawl, tmp_path):
    mine = tmp_path / "crawl"
    mine.mkdir()
    for name in ("web.jsonl", "books.jsonl"):
        (mine / name).write_bytes((crawl / name).read_bytes())
    out = tmp_path / "corpus"
    run_recipe(recipe(mine, out))
    before = list_times(out)
    row = {"text": "the house " * 30, "id": "new"}
    (mine / "more.jsonl").write_text(json.dumps(row) + "\n")
    web_paths = [str(mine / "web.jsonl"), str(mine / "more.jsonl")]
    sources = [
        {"name": "web", "documents": web_paths},
        {"name": "books", "documents": [str(mine / "books.jsonl")]},
    ]
    run_recipe(recipe(mine, out, sources=sources))
    after = list_times(out)
    kept_as_is = {
        path.parent.name for path in before if after.get(path) == before[path]
    }
    assert kept_as_is == {"documents", "language", "heuristics", "pii"}
    assert "new" in kept(out, keep={})
    run_recipe(recipe(mine, out))  # and away again
    assert "new" not in kept(out, keep={})
    # The shards of the new file are gone, too.
    document_paths = list(out.glob("documents/*.parquet"))
    assert len(document_paths) == len(OpenCorpus.open(out).shards)


SCRIPT = """
import resource, signal, sys
from pathlib import Path
from maxlm.config import MaxlmError
from maxlm.corpus.run import run_recipe
from tests.corpus.corpora import recipe

if __name__ == "__main__":
    crawl, out, workers, limit = sys.argv[1:]
    if int(limit):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        run_recipe(recipe(Path(crawl), out, workers=int(workers)))
    except MaxlmError as error:
        sys.exit(f"refused: {error}")
"""


def start(folder, *arguments):
    script = folder / "run.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stage", ["documents", "near"])
def test_a_killed_run_goes_on(whole, crawl, tmp_path, stage):
    out = tmp_path / "corpus"
    process = start(tmp_path, crawl, out, 2, 0)
    waits = time.monotonic() + 300
    while not any((out / stage).glob("*")) and time.monotonic() < waits:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert any((out / stage).glob("*"))
    with pytest.raises(MaxlmError, match=r"not finished|no corpus"):
        OpenCorpus.open(out)
    run_recipe(recipe(crawl, out))
    assert files(out) == files(whole)
    names = [path.name for path in out.rglob("*")]
    assert [name for name in names if name.startswith(".")] == []
    assert "scratch" not in names


def test_a_full_disk_is_an_error_and_the_next_run_completes(whole, crawl, tmp_path):
    out = tmp_path / "corpus"
    process = start(tmp_path, crawl, out, 1, 9_000)
    _, message = process.communicate(timeout=300)
    assert "refused: " in message
    assert "cannot write" in message
    assert "free some disk space" in message
    run_recipe(recipe(crawl, out))
    assert files(out) == files(whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keep": {"x": "heuristics.wordz > 1"}},
            "keep.x: .*did you mean heuristics.words",
        ),
        (
            {"keep": {"x": "published.gofer"}},
            'keep.x: there is no published rule "gofer"',
        ),
        ({"keep": {"a b": "heuristics.words > 1"}}, "cannot be the name of a rule"),
        (
            {"stages": [{"stage": "exact", "keep_by": "words"}], "keep": {}},
            'no label "words"',
        ),
        (
            {
                "stages": [
                    {"stage": "language"},
                    {"stage": "exact", "keep_by": "-language.name"},
                ],
                "keep": {},
            },
            "holds no numbers",
        ),
        (
            {
                "stages": [
                    {"stage": "perplexity", "models": {"en": "m"}, "language": "meta"}
                ],
                "keep": {},
            },
            '"meta" holds no strings',
        ),
        ({"cut": ["near.of"]}, "holds spans to cut"),
        (
            {"cut": ["language.spans"]},
            "cut: language.spans are places .* put language after pii",
        ),
        ({"cut": ["pii.spans"]}, "as it was before pii changed it"),
        (
            {
                "stages": [{"stage": "exact", "where": "language.name is None"}],
                "keep": {},
            },
            "stages.0.where",
        ),
        (
            {"sources": [{"name": "web", "documents": ["/nowhere/at/all"]}]},
            "/nowhere/at/all",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    crawl, tmp_path, settings, message
):
    with pytest.raises(MaxlmError, match=message):
        run_recipe(recipe(crawl, tmp_path / "corpus", **settings))
    assert not (tmp_path / "corpus").exists()


def test_a_package_that_is_not_installed_is_named_before_anything_is_written(
    crawl, tmp_path, monkeypatch
):
    monkeypatch.setattr(PiiStage, "packages", ("no-such-package",))
    with pytest.raises(MaxlmError, match=r"stage pii needs no-such-package") as error:
        run_recipe(recipe(crawl, tmp_path / "corpus"))
    assert error.value.fix == "pip install 'maxlm[corpus]'"
    assert not (tmp_path / "corpus").exists()


def test_a_folder_of_something_else_is_left_alone(crawl, tmp_path):
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(MaxlmError, match="holds no corpus"):
        run_recipe(recipe(crawl, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_labels_after_a_comparison_follow_the_documents(tmp_path):
    text = "Write to jean.dupont@example.org or do not write at all, dear reader of this page."
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"text": text, "id": name}) + "\n"
        )
    stages = [{"stage": "exact"}, {"stage": "pii", "where": "not exact.duplicate"}]
    for names in ("ab", "b"):
        documents = [str(tmp_path / f"{name}.jsonl") for name in names]
        sources = [{"name": "web", "documents": documents}]
        settings = {"sources": sources, "stages": stages, "keep": {}}
        run_recipe(recipe(tmp_path, tmp_path / "again", **settings))
    run_recipe(recipe(tmp_path, tmp_path / "fresh", **settings))
    assert files(tmp_path / "again") == files(tmp_path / "fresh")
    labels, _ = find_document(OpenCorpus.open(tmp_path / "again"), "b")
    assert "jean.dupont" not in labels["text"]


def test_a_run_that_stops_leaves_no_corpus_of_two_recipes(crawl, tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    run_recipe(recipe(crawl, out))
    stages = list(recipe(crawl, out).model_dump()["stages"])
    stages[1] = {"stage": "heuristics", "stop_words": ["river"]}
    stages[2] = {"stage": "pii", "where": "heuristics.stop_words >= 1"}
    real = run._run_step

    def stops(folder, step, *rest):
        if step.stage.unique_name == "pii":
            raise KeyboardInterrupt
        real(folder, step, *rest)

    monkeypatch.setattr(run, "_run_step", stops)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(crawl, out, stages=stages))
    with pytest.raises(MaxlmError, match="the stage pii is not finished"):
        OpenCorpus.open(out)


def test_a_corpus_of_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    pq.write_table(
        pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet"
    )
    names = ["url", "extract", "language", "heuristics", "toxicity", "pii"]
    names += ["exact", "near", "substring"]
    settings = {
        "sources": [
            {
                "name": "web",
                "documents": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")],
            }
        ],
        "stages": [{"stage": name} for name in names],
        "keep": {},
    }
    out = run_recipe(recipe(tmp_path, tmp_path / "c", **settings))
    corpus = OpenCorpus.open(out)
    assert kept(out) == []
    with WorkerPool(1) as pool:
        summary = summarize_corpus(corpus, corpus.resolve_rules(), pool)
    write_report(corpus, corpus.resolve_rules(), summary, tmp_path / "page.html")
    assert "0 documents read" in (tmp_path / "page.html").read_text()


def test_a_corpus_does_not_read_itself(crawl, tmp_path):
    inside = [{"name": "web", "documents": [str(tmp_path)]}]
    with pytest.raises(MaxlmError, match="which it is made of"):
        run_recipe(recipe(crawl, tmp_path / "data" / "corpus", sources=inside))
    matching = [{"name": "web", "documents": [str(tmp_path / "**" / "*.parquet")]}]
    pq.write_table(
        pa.table({"text": ["some text of a document"]}), tmp_path / "a.parquet"
    )
    run_recipe(recipe(crawl, tmp_path / "d", sources=matching))
    with pytest.raises(MaxlmError, match="would be made of its own file"):
        run_recipe(recipe(crawl, tmp_path / "d", sources=matching))
    with pytest.raises(MaxlmError, match="a corpus lies among the files"):
        list(read_documents(SourceConfig(documents=(str(tmp_path),))))


def test_a_store_of_a_pattern_of_corpora_follows_their_rules(crawl, tmp_path):
    folder = tmp_path / "g" / "web"
    train_tokenizer(TokenizerConfig(vocab_size=257), [b"a"]).save(tmp_path / "t")
    run_recipe(recipe(crawl, folder, keep={}))
    source = SourceConfig(documents=(str(tmp_path / "g" / "*"),))
    build_store(source, tmp_path / "t", tmp_path / "s", workers=1)
    run_recipe(recipe(crawl, folder, keep={"long": "heuristics.words > 30"}))
    with pytest.raises(MaxlmError, match=r"the rules by which .* have changed"):
        build_store(source, tmp_path / "t", tmp_path / "s", workers=1)
