"""Exact deduplication against a dictionary of normalised texts."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.corpus.recipe import RecipeConfig
from maxlm.corpus.run import run_recipe
from maxlm.corpus.stage import JobRunner
from maxlm.corpus.stages.exact import ExactStage
from maxlm.corpus.text import LineSplitterConfig, make_line_splitter
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents
from tests.corpus.corpora import add_labels, labels, make_corpus, run_stage

TEXTS = [
    "One text.",
    "one  TEXT.\n",
    "Another",
    "",
    " \t",
    "caf\u00e9",
    "cafe\u0301",
    "\x00",
    "日本語",
]


def by_dictionary(
    documents: Sequence[str | None], scores: list[float | None]
) -> list[dict]:
    """What the labels should be, computed with everything in memory."""
    groups: dict[str, list[int]] = {}
    for i, text in enumerate(documents):
        if text is not None:
            key = " ".join(unicodedata.normalize("NFC", text).lower().split())
            groups.setdefault(key, []).append(i)
    nothing = dict.fromkeys(("duplicate", "of", "copies", "seen_before", "group"))
    expected = [{"id": f"d{i}"} | nothing for i in range(len(documents))]
    # A document without a score is worse than any with one; of equals the first stays.
    values = [float("-inf") if score is None else score for score in scores]
    for group in groups.values():
        best = max(group, key=lambda i: (values[i], -i))
        for i in group:
            expected[i] |= {
                "duplicate": i != best,
                "of": None if i == best else f"d{best}",
                "copies": len(group),
                "seen_before": False,
                "group": best if len(group) > 1 else None,
            }
    return expected


@pytest.mark.parametrize(
    ("shards", "memory", "workers"),
    [(1, 1 << 29, 1), (3, 1 << 10, 1), (4, 3000, 2), (40, 3000, 1)],
)
def test_labels_are_those_of_a_dictionary(
    tmp_path: Path, shards: int, memory: int, workers: int
) -> None:
    random_ = random.Random(shards)
    documents = [*random_.choices([*TEXTS, None], k=30), *map(str, range(20)), None]
    random_.shuffle(documents)
    scores = random_.choices([0.5, 2.0, -1.0, None], k=len(documents))
    shard_views = make_corpus(tmp_path / "corpus", documents, shards, rows_per_group=3)
    add_labels(shard_views, "quality", score=pa.array(scores, pa.float32()))
    stage = ExactStage(keep_by="quality.score", memory=memory)
    run_stage(stage, shard_views, tmp_path / "scratch", workers)
    assert labels(shard_views, stage).to_pylist() == by_dictionary(documents, scores)


@given(st.lists(st.one_of(st.sampled_from(TEXTS), st.text(max_size=3)), max_size=20))
def test_any_text_is_like_itself_and_its_normal_forms_only(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    shard_views = make_corpus(folder / "corpus", documents, 2)
    run_stage(ExactStage(memory=1 << 11), shard_views, folder / "scratch")
    if not documents:
        return
    expected = by_dictionary(documents, [0.0] * len(documents))
    assert labels(shard_views, ExactStage()).to_pylist() == expected


def _run_until(corpus: Path, scratch: Path, step: str) -> None:
    """Run in this process, which dies when a step begins, as by a kill."""

    def progress(title: str, done: int, total: int) -> None:
        if title.endswith(step) and done == 0:
            os._exit(9)

    from maxlm.runtime.pool import WorkerPool

    views = make_corpus(corpus, ["a", "b", "a", "c"])
    scratch.mkdir(exist_ok=True)
    with WorkerPool(1) as pool:
        views = [replace(view, output_stage="exact") for view in views]
        ExactStage().label(views, scratch, JobRunner("exact", pool, progress))


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    scratch = tmp_path / "scratch"
    context = multiprocessing.get_context("spawn")
    for step in ("group", "label"):
        process = context.Process(target=_run_until, args=(corpus, scratch, step))
        process.start()
        process.join()
        assert process.exitcode == 9
    shard_views = make_corpus(corpus, ["a", "b", "a", "c"])
    run_stage(ExactStage(), shard_views, scratch)
    table = labels(shard_views, ExactStage())
    assert table["duplicate"].to_pylist() == [False, False, True, False]


@pytest.mark.timeout(120)
def test_a_long_run_of_marks_takes_time_in_proportion():
    text = "a" + "\u0301\u0323" * 300_000
    assert ExactStage().normalize_text(text).startswith("\u1ea1\u0323")
    for accents in (True, False):
        split_lines = make_line_splitter(LineSplitterConfig(accents=accents))
        assert len(list(split_lines(text))) == 1


def run_with_index(
    folder: Path, texts: Sequence[str], changes: Mapping[str, object]
) -> dict[str, str]:
    """Runs a recipe with an index beside the corpus's folder; returns the texts that it
    keeps, by id."""
    folder.mkdir(exist_ok=True)
    rows = [{"text": text, "id": f"d{i}"} for i, text in enumerate(texts)]
    (folder / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"stage": "exact", "index": str(folder.parent / "index")}
    recipe = {
        "out": str(folder / "corpus"),
        "workers": 1,
        "sources": [{"name": "web", "documents": [str(folder / "web.jsonl")]}],
        "stages": [{"stage": "heuristics"}, stage],
        "keep": {
            "new": "not exact.seen_before and not exact.duplicate",
            "long": "heuristics.words >= 2",
        },
    }
    corpus = run_recipe(RecipeConfig.model_validate(recipe | changes))
    documents = read_documents(SourceConfig(documents=(str(corpus),)))
    return {document.id: document.text.decode() for document in documents}


def test_an_index_drops_what_earlier_corpora_keep_and_nothing_else(
    tmp_path: Path,
) -> None:
    one = ["a a", "b b", "a a", "short"]
    two = ["B  b", "c c", "d d"]
    three = ["d d", "e e", "A A", "short"]

    def list_kept(name: str, texts: Sequence[str], **changes) -> list[str]:
        return list(run_with_index(tmp_path / name, texts, changes).values())

    assert list_kept("one", one) == ["a a", "b b"]
    assert list_kept("two", two) == ["c c", "d d"]
    # Dropped by a rule of the first corpus, the last text is in none: it is kept where
    # rules allow.
    keep = {"new": "not exact.seen_before and not exact.duplicate"}
    assert list_kept("three", three, keep=keep) == ["e e", "short"]
    # Run again, each is compared with those before it, and so neither with itself nor
    # with later ones; what it keeps no longer is free for others.
    assert list_kept("one", ["b b", "e e"]) == ["b b", "e e"]
    shutil.rmtree(tmp_path / "two" / "corpus" / "exact")
    assert list_kept("two", [*two, "a a"]) == ["c c", "d d", "a a"]
    files = sorted((tmp_path / "index").glob("*.digests"))
    expected = [["b b", "e e"], ["c c", "d d", "a a"], ["e e", "short"]]
    for path, texts in zip(files, expected, strict=True):
        digests = sorted(hashlib.sha256(text.encode()).digest()[:16] for text in texts)
        assert path.read_bytes() == b"".join(digests)


def test_an_index_of_other_settings_or_of_two_stages_is_refused(tmp_path: Path) -> None:
    run_with_index(tmp_path / "one", ["a a"], changes={})
    stage = {"stage": "exact", "index": str(tmp_path / "index"), "case": False}
    other_case = {"stages": [{"stage": "heuristics"}, stage]}
    message = r"normalised by .*; set the same, or name another folder"
    with pytest.raises(MaxlmError, match=message):
        run_with_index(tmp_path / "two", ["a a"], other_case)
    index_twice = {"stages": [stage, stage | {"name": "again"}]}
    with pytest.raises(ValueError, match="two stages use the index"):
        run_with_index(tmp_path / "three", ["a a"], index_twice)
