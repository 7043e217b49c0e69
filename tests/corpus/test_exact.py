"""Exact deduplication against a dictionary of normalised texts."""

import hashlib
import multiprocessing
import os
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.corpus.stage import JobRunner
from maxlm.corpus.stages.exact import ExactStage
from maxlm.corpus.text import LineSplitterConfig, make_line_splitter
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


def by_dictionary(documents: Sequence[str | None], scores: list[float | None]) -> list[dict]:
    """What the labels should be, computed with everything in memory."""
    groups: dict[str, list[int]] = {}
    for i, text in enumerate(documents):
        if text is not None:
            key = " ".join(unicodedata.normalize("NFC", text).lower().split())
            groups.setdefault(key, []).append(i)
    nothing = dict.fromkeys(("duplicate", "of", "copies", "seen_before"))
    expected = [{"id": f"d{i}"} | nothing for i in range(len(documents))]
    for group in groups.values():
        value = {i: float("-inf") if (s := scores[i]) is None else s for i in group}
        kept = max(group, key=lambda i: (value[i], -i))
        for i in group:
            expected[i] |= {
                "duplicate": i != kept,
                "of": None if i == kept else f"d{kept}",
                "copies": len(group),
                "seen_before": False,
            }
    return expected


@pytest.mark.parametrize(
    ("shards", "memory", "workers"), [(1, 1 << 29, 1), (3, 1 << 10, 1), (4, 3000, 2), (40, 3000, 1)]
)
def test_labels_are_those_of_a_dictionary(
    tmp_path: Path, shards: int, memory: int, workers: int
) -> None:
    random_ = random.Random(shards)
    documents = [*random_.choices([*TEXTS, None], k=30), *map(str, range(20)), None]
    random_.shuffle(documents)
    scores = random_.choices([0.5, 2.0, -1.0, None], k=len(documents))
    made = make_corpus(tmp_path / "corpus", documents, shards, rows_per_group=3)
    add_labels(made, "quality", score=pa.array(scores, pa.float32()))
    stage = ExactStage(keep_by="quality.score", memory=memory)
    run_stage(stage, made, tmp_path / "scratch", workers)
    assert labels(made, stage).to_pylist() == by_dictionary(documents, scores)


@given(st.lists(st.one_of(st.sampled_from(TEXTS), st.text(max_size=3)), max_size=20))
def test_any_text_is_like_itself_and_its_normal_forms_only(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    made = make_corpus(folder / "corpus", documents, 2)
    run_stage(ExactStage(memory=1 << 11), made, folder / "scratch")
    expected = by_dictionary(documents, [0.0] * len(documents))
    assert labels(made, ExactStage()).to_pylist() == expected if documents else True


def test_an_index_remembers_earlier_corpora_and_no_later_ones(tmp_path: Path) -> None:
    stage = ExactStage(index=str(tmp_path / "index"), memory=1 << 10)

    def seen(name: str, documents: list[str]) -> list[bool]:
        made = make_corpus(tmp_path / name, documents)
        run_stage(stage, made, tmp_path / "scratch")
        return labels(made, stage)["seen_before"].to_pylist()

    assert seen("one", ["a", "b", "a"]) == [False] * 3
    assert seen("two", ["B ", "c", "d"]) == [True, False, False]
    assert seen("three", ["d", "e", "a"]) == [True, False, True]
    # Run again, each is still compared with those before it, and so not with itself.
    assert seen("one", ["a", "b", "d"]) == [False] * 3
    assert seen("two", ["B ", "c", "d"]) == [True, False, True]
    files = sorted((tmp_path / "index").glob("*.digests"))
    assert [path.stat().st_size for path in files] == [3 * 32, 3 * 32, 3 * 32]
    assert files[0].read_bytes() == b"".join(
        sorted(hashlib.sha256(text).digest() for text in (b"a", b"b", b"d"))
    )


def test_an_index_knows_a_corpus_in_another_place_and_by_a_stage_of_another_name(
    tmp_path: Path,
) -> None:
    stage = ExactStage(index=str(tmp_path / "index"))
    made = make_corpus(tmp_path / "one", ["a", "b"])
    run_stage(stage, made, tmp_path / "scratch")
    (tmp_path / "one").rename(tmp_path / "two")
    moved = [replace(shard, folder=tmp_path / "two") for shard in made]
    renamed = stage.model_copy(update={"name": "copies"})
    run_stage(renamed, moved, tmp_path / "scratch")
    assert labels(moved, renamed)["seen_before"].to_pylist() == [False, False]
    assert len(list((tmp_path / "index").glob("*.digests"))) == 1


def test_an_index_of_other_settings_is_refused(tmp_path: Path) -> None:
    made = make_corpus(tmp_path / "corpus", ["a"])
    run_stage(ExactStage(index=str(tmp_path / "index")), made, tmp_path / "scratch")
    other = ExactStage(index=str(tmp_path / "index"), case=False)
    with pytest.raises(MaxlmError, match="normalised by"):
        run_stage(other, made, tmp_path / "scratch2")


def _run_until(corpus: Path, index: Path, scratch: Path, step: str) -> None:
    """Run in this process, which dies when a step begins, as by a kill."""

    def progress(title: str, done: int, total: int) -> None:
        if title.endswith(step) and done == 0:
            os._exit(9)

    from maxlm.runtime.pool import WorkerPool

    views = make_corpus(corpus, ["a", "b", "a", "c"])
    scratch.mkdir(exist_ok=True)
    with WorkerPool(1) as pool:
        stage = ExactStage(index=str(index))
        views = [replace(view, output_stage="exact") for view in views]
        stage.label(views, scratch, JobRunner("exact", pool, progress))


def test_a_killed_run_goes_on_and_enters_the_index_once(tmp_path: Path) -> None:
    paths = tmp_path / "corpus", tmp_path / "index", tmp_path / "scratch"
    context = multiprocessing.get_context("spawn")
    for step in ("group", "label"):
        process = context.Process(target=_run_until, args=(*paths, step))
        process.start()
        process.join()
        assert process.exitcode == 9
        assert not list(paths[1].glob("*.digests"))
    made = make_corpus(paths[0], ["a", "b", "a", "c"])
    stage = ExactStage(index=str(paths[1]))
    run_stage(stage, made, paths[2])
    found = labels(made, stage)
    assert found["duplicate"].to_pylist() == [False, False, True, False]
    assert found["seen_before"].to_pylist() == [False] * 4
    assert [p.stat().st_size for p in paths[1].glob("*.digests")] == [3 * 32]


@pytest.mark.timeout(120)
def test_a_long_run_of_marks_takes_time_in_proportion():
    text = "a" + "\u0301\u0323" * 300_000
    assert ExactStage().normalise(text).startswith("\u1ea1\u0323")
    for accents in (True, False):
        assert len(list(make_line_splitter(LineSplitterConfig(accents=accents))(text))) == 1
