"""Of a passage that a corpus repeats one copy stays, and all the others are cut,
whole."""

import random
import tempfile
import unicodedata
from dataclasses import replace
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.corpus.cuts import remove_spans
from maxlm.corpus.stage import JobRunner
from maxlm.corpus.stages.substring import SubstringStage
from maxlm.runtime.pool import WorkerPool
from maxlm.runtime.progress import ignore_progress
from tests.corpus.corpora import add_labels, labels, make_corpus, run_stage

SMALL = 1 << 10  # Blocks of 16 characters, and ranges of 16 windows.


@cache
def kind_of(character: str) -> str:
    """What a character is to the rule of words, by unicodedata."""
    category = unicodedata.category(character)
    name = unicodedata.name(character, "")
    if character.isspace():
        return "space"
    if category in ("Mn", "Mc", "Me", "Cf"):
        return "mark"
    alone = name.startswith(("CJK UNIFIED", "HIRAGANA LETTER", "THAI CHARACTER"))
    return "alone" if alone and category == "Lo" else "visible"


def words_of(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word, by the wording of the rule."""
    words = []
    last = "space"
    for i, kind in enumerate(map(kind_of, text)):
        if kind == "space":
            last = kind
        elif last != "space" and (kind == "mark" or kind == last == "visible"):
            words[-1] = (words[-1][0], i + 1)
        else:
            words.append((i, i + 1))
            last = "visible" if kind == "mark" else kind
    return words


def naive_cuts(texts, size, order=None):
    """The rule by brute force: every window beside every earlier one."""
    words = [words_of(text) for text in texts]
    if order is None:
        order = range(len(texts))
    windows = [
        (document, i)
        for document in order
        for i in range(len(words[document]) - size + 1)
    ]

    def span(document, i):
        start, _ = words[document][i]
        _, end = words[document][i + size - 1]
        return start, end

    gone = [[False] * len(document_words) for document_words in words]
    for at, (document, i) in enumerate(windows):
        start, end = span(document, i)
        for other, j in windows[:at]:
            other_start, other_end = span(other, j)
            # Within a document, a window is no repeat of one that it overlaps.
            overlaps = other == document and other_end > start
            is_same = texts[document][start:end] == texts[other][other_start:other_end]
            if is_same and not overlaps:
                gone[document][i : i + size] = [True] * size
    return [spans_of(places, flags) for places, flags in zip(words, gone, strict=True)]


def spans_of(places, flags):
    """The runs of words whose flag is true."""
    spans = []
    for i, (start, end) in enumerate(places):
        if flags[i] and i and flags[i - 1]:
            spans[-1] = (spans[-1][0], end)
        elif flags[i]:
            spans.append((start, end))
    return spans


def run(
    folder: Path, texts, stage=None, shards=3, workers=1, rows_per_group=7, **columns
):
    """The spans and shares that the stage gives to each document."""
    stage = stage or SubstringStage()
    shard_views = make_corpus(folder / "corpus", texts, shards, rows_per_group)
    for name, values in columns.items():
        add_labels(shard_views, name, score=pa.array(values, pa.float64()))
    run_stage(stage, shard_views, folder / "scratch", workers)
    return read(shard_views, stage)


def read(shard_views, stage):
    table = labels(shard_views, stage)
    cuts = []
    for spans in table.column("cuts").to_pylist():
        if spans is None:  # The document has no text.
            cuts.append(None)
        else:
            cuts.append([(span["start"], span["end"]) for span in spans])
    return cuts, table.column("cut_share").to_pylist()


def vocabulary(name: str, count: int) -> str:
    """A passage of `count` words that are in no other."""
    return " ".join(f"{name}{i}" for i in range(count))


def hanzi(seed: int, count: int) -> str:
    places = random.Random(seed).sample(range(20000), count)
    return "".join(chr(0x4E00 + place) for place in places)


A = vocabulary("a", 50)
B = vocabulary("b", 64)
C = vocabulary("c", 131)
NEW = iter(range(10**9))


def new(count: int) -> str:
    """Words that come once."""
    return " ".join(f"w{next(NEW)}" for _ in range(count))


EMOJI = " ".join(
    f"{a}\u200d{b}\ufe0f"
    for a, b in zip("👩👨🧑👧👦" * 11, "🚀🌈🔬🎓🍕🎨🚒" * 8, strict=False)
)
ARABIC = " ".join(
    "".join(random.Random(i).sample("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", 5))
    for i in range(60)
)
MARKS = " ".join(f"e\u0301x{i}o\u0308\u0323" for i in range(55))
KANA = "".join(
    c + "\u3099" for c in random.Random(1).choices("かきくけこさしすせそ", k=70)
)
THAI = "".join(c + "\u0e48" for c in random.Random(2).choices("กขคงจชซญดต", k=70))


@pytest.mark.parametrize("memory", [SMALL, 1 << 29])
@pytest.mark.parametrize(
    ("passage", "docs"),
    [
        # Within a document.
        (A, [f"{new(9)} {A} {new(9)} {A} {new(9)}"]),
        # At its start and its end.
        (B, [new(60), f"{B} {new(3)}", new(70), f"{new(3)} {B}"]),
        # Whole documents, three copies.
        (A, [A, A, A]),
        # In every shard.
        (C, [f"{new(5)}\n\n{C}\n\n{new(5)}" for _ in range(9)]),
        # Touching itself.
        (A, [f"{A} {A} {A}", new(80)]),
        # Touching another, in two orders.
        (B, [f"{A} {B}", new(60), f"{B} {A}", f"{A} {B}"]),
        (A, [f"{A} {B} {A} {B}"]),
        # Nested.
        (B, [f"{new(4)} {B} {new(4)}", f"{A} {B} {C}", new(5), f"{A} {B} {C}"]),
        (EMOJI, [f"{new(9)} {EMOJI} {new(9)}", f"{EMOJI} 👍"]),
        (ARABIC, [f"{ARABIC}\n{new(9)}", f"قال {ARABIC}"]),
        (MARKS, [MARKS, f"{new(9)} {MARKS} e\u0301"]),
        (
            hanzi(0, 77),
            [f"{hanzi(1, 90)}{hanzi(0, 77)}", f"{hanzi(0, 77)}{hanzi(2, 90)}。"],
        ),
        (KANA, [f"あ{KANA}い", f"{hanzi(3, 60)}{KANA}"]),
        (THAI, [f"ไ{THAI}", f"{THAI}ไ {new(60)}"]),
        (f"\0 \0\0 {A}", [f"{new(3)} \0 \0\0 {A}", f"\0 \0\0 {A} \0"]),
        (C, [C, "", C, None, " \n ", f"x\u2028{C}"]),
    ],
)
def test_of_every_planted_passage_one_copy_remains(tmp_path, passage, docs, memory):
    cuts, shares = run(tmp_path, docs, SubstringStage(memory=memory))
    remaining = [
        remove_spans(text, spans)
        for text, spans in zip(docs, cuts, strict=True)
        if text is not None
    ]
    assert sum(text.count(passage) for text in remaining) == 1
    assert passage in remaining[[passage in (text or "") for text in docs].index(True)]
    assert sum(text.count(passage[: len(passage) // 2]) for text in remaining) == 1
    for text, spans, share in zip(docs, cuts, shares, strict=True):
        if text is None:
            assert spans is None
            assert share is None
            continue
        lost = sum(end - start for start, end in spans)
        assert share == pytest.approx(lost / max(1, len(text)))
        words = words_of(text)
        starts = {start for start, _ in words}
        ends = {end for _, end in words}
        assert all(start in starts and end in ends for start, end in spans)
        # What is there but once stays.
        left = remove_spans(text, spans)
        unique_words = [word for word in text.split() if word[0] == "w"]
        assert [word for word in left.split() if word[0] == "w"] == unique_words


def jumble(seed: int) -> list[str]:
    """Up to 7 texts of few words, many of which come again in the same order."""
    random_ = random.Random(seed)
    words = ["a", "b", "ab", "é", "e\u0301", "字", "か\u3099", "🚀", "،"]
    random_.shuffle(words)
    texts = []
    for _ in range(random_.randint(1, 7)):
        count = random_.randint(0, 30)
        chosen = random_.choices(words, [60, 25, 10, 5, 4, 3, 2, 1, 1], k=count)
        spaces = random_.choices([" ", "\n", "", "  "], [90, 5, 5, 2], k=count)
        pairs = zip(chosen, spaces, strict=True)
        texts.append("".join(word + space for word, space in pairs))
    return texts


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(2, 5),
    memory=st.sampled_from([SMALL, 1 << 12, 1 << 29]),
    shards=st.integers(1, 3),
    scores=st.none()
    | st.lists(st.sampled_from([1.0, 2.0, None]), min_size=7, max_size=7),
)
def test_cuts_are_those_of_brute_force(seed, size, memory, shards, scores):
    texts = jumble(seed)
    keep_by = None
    order = None
    columns = {}
    if scores is not None:
        keep_by = "made.score"
        columns = {"made": scores[: len(texts)]}
        # A document without a score is worse than any with one.
        goodness = [-1.0 if score is None else score for score in scores]
        order = sorted(range(len(texts)), key=lambda i: -goodness[i])
    stage = SubstringStage(min_tokens=size, memory=memory, keep_by=keep_by)
    with tempfile.TemporaryDirectory() as folder:
        cuts, _ = run(Path(folder), texts, stage, shards, rows_per_group=2, **columns)
    assert cuts == naive_cuts(texts, size, order)


@pytest.mark.parametrize("shards", [1, 4])
def test_the_copy_of_the_best_document_is_kept(tmp_path, shards):
    docs = [f"{A} x", f"y {A}", f"{A} z", A]
    scores = [None, 0.5, 0.9, 0.9]
    best = SubstringStage(keep_by="made.score")
    cuts, _ = run(tmp_path / "a", docs, best, shards, made=scores)
    assert [bool(spans) for spans in cuts] == [True, True, False, True]
    worst = SubstringStage(keep_by="-made.score")
    cuts, _ = run(tmp_path / "b", docs, worst, shards, made=scores)
    assert [bool(spans) for spans in cuts] == [True, False, True, True]


class Dying:
    """An engine whose `after`th job is never done."""

    def __init__(self, after):
        self.left = after

    def map_unordered(self, function, jobs):
        for job in jobs:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield function(job)


@pytest.mark.parametrize("after", [0, 2, 4, 6, 9])
def test_a_killed_run_goes_on_and_ends_with_the_same_labels(tmp_path, after):
    texts = [text for seed in range(20) for text in jumble(seed)]
    expected, _ = run(tmp_path / "whole", texts, SubstringStage(min_tokens=4), shards=4)
    stage = SubstringStage(min_tokens=4, memory=1 << 12)
    shard_views = make_corpus(tmp_path / "corpus", texts, shards=4)
    views = [replace(shard, output_stage=stage.unique_name) for shard in shard_views]
    scratch = tmp_path / "scratch"
    dying_runner = JobRunner("", Dying(after), ignore_progress)
    with pytest.raises(KeyboardInterrupt):
        stage.label(views, scratch, dying_runner)
    # The first jobs, one a shard, write its windows.
    times = {path: path.stat().st_mtime_ns for path in scratch.rglob("*.windows")}
    assert len(times) == min(after, 4)
    with WorkerPool(1) as pool:
        stage.label(views, scratch, JobRunner("", pool, ignore_progress))
    cuts, _ = read(shard_views, stage)
    assert cuts == expected
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert not list(scratch.rglob(".*"))
