"""Whatever the order of stages and rules, and in every mixture, copies are settled
among what the rules keep: no text is gone of which the rules would keep some copy."""

import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.corpus.lost import count_lost_text
from maxlm.corpus.opened import OpenCorpus
from maxlm.corpus.recipe import RecipeConfig
from maxlm.corpus.run import run_recipe
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents
from maxlm.runtime.pool import WorkerPool

SIZE = 8  # Words of a passage.
BEST = "heuristics.words"
HEURISTICS = {"stage": "heuristics"}
EXACT = {"stage": "exact", "keep_by": BEST}
NEAR = {"stage": "near", "keep_by": BEST, "where": "not exact.duplicate"}
NEAR_FIRST = {"stage": "near", "keep_by": BEST}
EXACT_LAST = {"stage": "exact", "where": "not near.duplicate"}
SUBSTRING = {"stage": "substring", "min_tokens": SIZE}
AFTER_COPIES = {"where": "not exact.duplicate and not near.duplicate"}
DECONTAMINATE = {"stage": "decontaminate", "shortest": 5, "ngram": 5}
# A rule's label behind the stages that compare, as toxicity would be.
LATER = {"stage": "heuristics", "name": "later"}
ORDERS = {
    "demo": [HEURISTICS, EXACT, NEAR, SUBSTRING | AFTER_COPIES, LATER, DECONTAMINATE],
    "rules last": [
        HEURISTICS,
        NEAR_FIRST,
        EXACT_LAST,
        LATER | {"where": "not near.duplicate"},
        DECONTAMINATE,
        SUBSTRING,
    ],
    "passages first": [HEURISTICS, SUBSTRING, NEAR_FIRST, EXACT, DECONTAMINATE, LATER],
    "by turns": [HEURISTICS, EXACT, DECONTAMINATE, SUBSTRING, LATER, NEAR],
    "first copies": [
        {"stage": "exact"},
        {"stage": "near", "where": "not exact.duplicate"},
        SUBSTRING | AFTER_COPIES,
        HEURISTICS,
        LATER,
        DECONTAMINATE,
    ],
}
RULES = {
    "recipe": {
        "site": 'url != "bad"',
        "unique": "not exact.duplicate and not near.duplicate",
        "cut": "substring.cut_share < 0.5",
        "clean": "not decontaminate.contaminated",
        "letters": "later.alphabetic_words >= 0.8",
    },
    "looser": {
        "unique": "not exact.duplicate and not near.duplicate",
        "cut": "substring.cut_share < 0.7",
        "clean": "not decontaminate.contaminated",
    },
    "other": {
        "site": 'url == "bad" or heuristics.words > 40',
        "cut": "substring.cut_share < 0.5 and not near.duplicate",
        "unique": "not exact.duplicate",
    },
}
QUESTION = "which of these seven rivers runs north"


def prose(chance: random.Random, count: int) -> str:
    return " ".join(f"w{chance.randrange(10**6)}" for _ in range(count))


def make_crawl(seed: int, originals: int) -> list[dict[str, str]]:
    """Documents with copies, edited copies, copies with junk or a question of a test
    added, and passages that many share. About a third are of a site that a rule
    drops."""
    chance = random.Random(seed)
    passages = [prose(chance, chance.randint(SIZE, 30)) for _ in range(originals // 6)]
    passages += [
        f"{prose(chance, 5)} {passages[0]} {prose(chance, 6)}",
        "ha " * 20 + "ha",
    ]
    texts = []
    for _ in range(originals):
        parts = [prose(chance, chance.randint(5, 40))]
        parts += chance.choices(passages, k=chance.randint(0, 3))
        chance.shuffle(parts)
        texts.append(" ".join(parts))
    for text in chance.choices(texts, k=originals * 3 // 2):
        words = text.split()
        kind = chance.randrange(6)
        if kind == 0:
            text = text.upper()
        elif kind == 1:
            words[chance.randrange(len(words))] = "edited"
            text = " ".join(words)
        elif kind == 2:
            text = " ".join(["begun", *words[1:], "so", "ended"])
        elif kind == 3:
            text += f" {QUESTION}"
        elif kind == 4:
            text += " 1 2 3 4 5 6 7 8 9 " * chance.randint(1, 2)
        texts.append(text)
    rows = []
    for i, text in enumerate(texts):
        # The originals, which come first, more often than their copies.
        is_bad = chance.random() < 0.5 - 0.3 * i / len(texts)
        rows.append({"id": f"d{i}", "text": text, "url": "bad" if is_bad else ""})
    chance.shuffle(rows)
    return rows


def make_corpus(
    folder: Path,
    rows: Sequence[Mapping[str, str]],
    stages: Sequence[Mapping[str, object]],
    **rules,
) -> OpenCorpus:
    folder.mkdir(exist_ok=True)
    if not (folder / "web.jsonl").exists():
        (folder / "web.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    (folder / "quiz.jsonl").write_text(json.dumps({"text": QUESTION}) + "\n")
    quiz = {"sets": {"quiz": {"documents": [str(folder / "quiz.jsonl")]}}}
    recipe = {
        "out": str(folder / "corpus"),
        "workers": 1,
        "shard_bytes": 20_000,
        "sources": [{"name": "web", "documents": [str(folder / "web.jsonl")]}],
        "stages": [
            dict(stage) | (quiz if stage["stage"] == "decontaminate" else {})
            for stage in stages
        ],
        "cut": ["substring.cuts"],
    }
    return OpenCorpus.open(run_recipe(RecipeConfig.model_validate(recipe | rules)))


def read(corpus: OpenCorpus, keep: dict[str, str] | None = None) -> dict[str, str]:
    """The texts that rules keep (by default the corpus's), by id."""
    source = SourceConfig(documents=(str(corpus.folder),), keep=keep)
    return {document.id: document.text.decode() for document in read_documents(source)}


def make_grams(text: str, size: int) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def is_alike(one: set[str], other: set[str]) -> bool:
    return len(one & other) >= 0.8 * len(one | other)


def without_copies(rules: Mapping[str, str]) -> dict[str, str]:
    """The rules as they are if no document is like another one."""
    neutral = {
        "exact.duplicate": "False",
        "near.duplicate": "False",
        "substring.cut_share": "0.0",
    }
    neutral_rules = {}
    for name, text in rules.items():
        for label, value in neutral.items():
            text = text.replace(label, value)
        neutral_rules[name] = text.replace("not False and not False", "True")
    return neutral_rules


def list_kept_alone(corpus: OpenCorpus, keep: Mapping[str, str]) -> list[str]:
    """The documents that rules keep if no document is like another one, by the stages'
    labels."""
    rules = corpus.resolve_rules(without_copies(keep)).keep.values()
    columns = list({"id", "text"}.union(*(rule.label_names for rule in rules)))
    names = []
    for shard in corpus.shards:
        for table in shard.read_row_groups(columns):
            verdicts = [rule.evaluate(table) for rule in rules]
            for row, name in enumerate(table.column("id").to_pylist()):
                if all(verdict[row] for verdict in verdicts):
                    names.append(name)
    return names


def list_passages(text: str) -> Iterator[str]:
    """The runs of SIZE words of a passage of as many or more."""
    words = text.split()
    for i in range(len(words) - SIZE + 1):
        yield " ".join(words[i : i + SIZE])


def find_lost(
    rows: Sequence[Mapping[str, str]],
    alone: Sequence[str],
    kept_texts: Mapping[str, str],
    labels: Mapping[str, Mapping],
) -> tuple[list[str], list[str]]:
    """Finds by brute force, in the texts: documents that being copies alone costs, and
    that are like no kept one; and passages cut that are in no kept text.

    Args:
        alone: the documents that the rules keep if no document is like another one.
        kept_texts: the texts kept, by id.
        labels: cuts and cut_share, by id.
    """
    texts = {row["id"]: row["text"] for row in rows}
    grams = [make_grams(texts[name], 5) for name in kept_texts]
    texts_of_kept = "\n".join(pad_words(text) for text in kept_texts.values())
    documents = []
    passages = []
    for name in alone:
        spans = labels[name]["cuts"] or ()
        # A document of which most is repeated goes by the rule that says so, but not
        # its passages.
        goes_by_share = (labels[name]["cut_share"] or 0) >= 0.5
        if name in kept_texts or goes_by_share:
            everything = texts_of_kept
            if goes_by_share:
                # What it repeats of itself goes with what only it has.
                everything += pad_words(cut(texts[name], spans))
            for span in spans:
                passage = texts[name][span["start"] : span["end"]]
                windows = list_passages(passage)
                if not all(pad_words(window) in everything for window in windows):
                    passages.append(passage)
        else:
            name_grams = make_grams(texts[name], 5)
            if not any(is_alike(name_grams, other) for other in grams):
                documents.append(name)
    return documents, passages


def pad_words(text: str) -> str:
    """The words with one space before, between and behind them, so that a search for
    some finds whole words only."""
    return f" {' '.join(text.split())} "


def cut(text: str, spans: Sequence[Mapping[str, int]]) -> str:
    characters = list(text)
    for span in spans:
        # Every character of it is a break; the places of the others stay.
        characters[span["start"] : span["end"]] = "\n" * (span["end"] - span["start"])
    return "".join(characters)


def read_labels(shards) -> dict[str, dict]:
    columns = ["id", "substring.cuts", "substring.cut_share"]
    labels = {}
    for shard in shards:
        for table in shard.read_row_groups(columns):
            for row in table.to_pylist():
                labels[row["id"]] = {
                    "cuts": row["substring.cuts"],
                    "cut_share": row["substring.cut_share"],
                }
    return labels


@pytest.mark.parametrize("order", ORDERS)
def test_no_text_is_lost_in_any_order_of_stages_and_rules(tmp_path, order):
    rows = make_crawl(len(order), 120)
    corpus = make_corpus(tmp_path, rows, ORDERS[order], keep=RULES["recipe"])
    for name, keep in RULES.items():
        kept_texts = read(corpus, keep=keep)
        alone = list_kept_alone(corpus, keep)
        rules = corpus.resolve_rules(keep)
        labels = read_labels(corpus.settle_rules(rules))
        assert find_lost(rows, alone, kept_texts, labels) == ([], []), name
        assert len(alone) > len(kept_texts) + 20
        assert len(kept_texts) > 20
        with WorkerPool(1) as pool:
            counted = count_lost_text(corpus, rules, pool)
        assert (counted.documents, counted.passages) == (0, 0)
        assert counted.dropped_documents > 20
        assert counted.cut_passages > 20
        # Copies go: no two documents are kept that are alike.
        grams = [make_grams(row["text"], 5) for row in rows if row["id"] in kept_texts]
        for one, other in combinations(grams, 2):
            assert not is_alike(one, other), name


def test_text_lost_is_counted_where_verdicts_are_those_of_other_rules(
    tmp_path, monkeypatch
):
    rows = make_crawl(3, 120)
    corpus = make_corpus(tmp_path, rows, ORDERS["demo"], keep=RULES["recipe"])
    keep = RULES["recipe"]
    rules = corpus.resolve_rules(keep)
    others = corpus.settle_rules(corpus.resolve_rules(RULES["looser"]))
    monkeypatch.setattr(OpenCorpus, "settle_rules", lambda *_: others)
    kept_texts = read(corpus, keep=keep)
    alone = list_kept_alone(corpus, keep)
    documents, passages = find_lost(rows, alone, kept_texts, read_labels(others))
    with WorkerPool(1) as pool:
        counted = count_lost_text(corpus, rules, pool)
    # The count leaves out passages of documents that are copies as well.
    assert 0.8 * len(passages) < counted.passages < 1.2 * len(passages)
    assert counted.documents == len(documents) > 5
    total = counted.documents + counted.passages
    assert str(counted).startswith(
        f"text lost: {total} (of {counted.dropped_documents} documents "
    )


def decide_naively(
    rows: Sequence[Mapping[str, str]], alone: Sequence[str], least_share: float
) -> dict[str, set[int]]:
    """The rule of `maxlm.corpus.settling`, word by word, for the stages and rules of
    the recipe in the demo's order: the words cut of each kept document."""
    texts = {row["id"]: row["text"] for row in rows}
    cut_words: dict[str, set[int]] = {}
    # Passages that stand in one piece in what stays of kept documents.
    whole: set[str] = set()
    # The documents of most words first: the stages keep by heuristics.words.
    order = sorted(alone, key=lambda name: -len(texts[name].split()))
    for name in order:
        text = texts[name]
        words = [match.span() for match in re.finditer(r"\S+", text)]
        starts = range(len(words) - SIZE + 1)
        passages = [text[words[i][0] : words[i + SIZE - 1][1]] for i in starts]
        grams = make_grams(text, 5)
        if any(is_alike(grams, make_grams(texts[other], 5)) for other in cut_words):
            continue
        # Words in a passage of another document, then in an earlier one of this one.
        gone = set()
        for i in starts:
            if passages[i] in whole:
                gone.update(range(i, i + SIZE))
        for i in starts:
            for j in range(i - SIZE + 1):
                if passages[j] == passages[i] and gone.isdisjoint(range(j, j + SIZE)):
                    gone.update(range(i, i + SIZE))
        characters = set()
        for i in gone:
            characters.update(range(*words[i]))
            if i + 1 in gone:
                characters.update(range(words[i][1], words[i + 1][0]))
        if len(characters) / len(text) < least_share:
            cut_words[name] = gone
            for i in starts:
                if gone.isdisjoint(range(i, i + SIZE)):
                    whole.add(passages[i])
    return cut_words


@pytest.mark.parametrize("seed", range(3))
def test_documents_are_decided_as_the_rule_says(tmp_path, seed):
    rows = make_crawl(seed, 60)
    keep = RULES["recipe"]
    corpus = make_corpus(tmp_path, rows, ORDERS["demo"], keep=keep)
    expected = decide_naively(rows, list_kept_alone(corpus, keep), 0.5)
    texts = {row["id"]: row["text"] for row in rows}
    remaining = {}
    for name, gone in expected.items():
        words = texts[name].split()
        remaining[name] = [word for i, word in enumerate(words) if i not in gone]
    assert {name: text.split() for name, text in read(corpus).items()} == remaining
    assert any(expected.values())


def test_other_rules_cost_no_pass_over_texts(tmp_path):
    rows = make_crawl(1, 40)
    corpus = make_corpus(tmp_path, rows, ORDERS["demo"], keep=RULES["recipe"])
    before = {
        path: path.stat().st_mtime_ns for path in corpus.folder.glob("*/*.parquet")
    }
    other = make_corpus(tmp_path, rows, ORDERS["demo"], keep=RULES["looser"])
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert read(other) == read(corpus, keep=RULES["looser"])
    settled = {path.parent.name for path in corpus.folder.glob("settled/*/*.parquet")}
    assert len(settled) == 1  # The mixture's rules are the same set, and settled once.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keep": {"a": "near.duplicate"}},
            "keep.a: 'near.duplicate' selects documents, such as 'd[0-9]+', because others",
        ),
        (
            {"keep": {"a": "near.jaccard < 0.9"}},
            "write it so that it selects fewer by these labels, like: not "
            "near.duplicate",
        ),
        (
            {
                "stages": [
                    EXACT_LAST | {"where": None},
                    HEURISTICS | {"where": "exact.duplicate"},
                ],
                "keep": {"a": "heuristics.words > 3"},
                "cut": [],
            },
            "stages.1.where: 'exact.duplicate' selects documents",
        ),
        (
            {
                "stages": [
                    *ORDERS["demo"][:3],
                    SUBSTRING | {"keep_by": "-heuristics.words"},
                ],
                "keep": {
                    "unique": "not near.duplicate",
                    "cut": "substring.cut_share < 0.5",
                },
            },
            "exact keeps by heuristics.words and substring by -heuristics.words: .*"
            "give both the same keep_by",
        ),
    ],
)
def test_what_cannot_be_settled_is_refused_with_the_fix(tmp_path, changes, message):
    rules = {"stages": ORDERS["demo"], "keep": RULES["recipe"]} | changes
    with pytest.raises(MaxlmError, match=message):
        read(make_corpus(tmp_path, make_crawl(0, 30), **rules))


def test_passages_that_only_are_cut_may_be_kept_by_another_label(tmp_path):
    """Where no rule names them, they are cut of kept documents, in an order of their
    own."""
    rows = make_crawl(4, 60)
    stages = [*ORDERS["demo"][:3], SUBSTRING | {"keep_by": "-heuristics.words"}]
    keep = {"unique": RULES["recipe"]["unique"], "site": RULES["recipe"]["site"]}
    corpus = make_corpus(tmp_path, rows, stages, keep=keep)
    kept_texts = read(corpus)
    labels = read_labels(corpus.settle_rules(corpus.resolve_rules()))
    assert find_lost(rows, list_kept_alone(corpus, keep), kept_texts, labels) == (
        [],
        [],
    )
    texts = {row["id"]: row["text"] for row in rows}
    shortest = min(
        kept_texts, key=lambda name: (len(texts[name].split()), int(name[1:]))
    )
    assert kept_texts[shortest] == texts[shortest]
    assert any(kept_texts[name] != texts[name] for name in kept_texts)


def test_several_labels_that_cut_lose_nothing_to_each_other(tmp_path):
    """Passages of two lengths, and what a test has, cut out of the same texts."""
    rows = make_crawl(8, 60)
    long = {
        "stage": "substring",
        "name": "long",
        "min_tokens": 2 * SIZE,
        "keep_by": BEST,
    }
    stages = [HEURISTICS, EXACT, SUBSTRING, DECONTAMINATE, long]
    cuts = ["long.cuts", "decontaminate.cuts", "substring.cuts"]
    keep = {"unique": "not exact.duplicate", "site": RULES["recipe"]["site"]}
    corpus = make_corpus(tmp_path, rows, stages, keep=keep, cut=cuts)
    kept_texts = read(corpus)
    everything = "\n".join(pad_words(text) for text in kept_texts.values())
    texts = {row["id"]: row["text"] for row in rows}
    windows = []
    for shard in corpus.settle_rules(corpus.resolve_rules()):
        for table in shard.read_row_groups(["id", "long.cuts", "substring.cuts"]):
            for row in table.to_pylist():
                if row["id"] not in kept_texts:
                    continue
                spans = (row["long.cuts"] or []) + (row["substring.cuts"] or [])
                for span in spans:
                    passage = texts[row["id"]][span["start"] : span["end"]]
                    windows += list_passages(passage)
    assert len(windows) > 500
    assert all(pad_words(window) in everything for window in windows)
    assert QUESTION not in everything
    with WorkerPool(1) as pool:
        counted = count_lost_text(corpus, corpus.resolve_rules(), pool)
    assert (counted.documents, counted.passages) == (0, 0)


def test_labels_of_another_run_are_settled_anew(tmp_path):
    rows = make_crawl(1, 30)
    stages = [{"stage": "exact", "index": str(tmp_path / "index")}, SUBSTRING]
    keep = {"new": "not exact.seen_before and not exact.duplicate"}
    corpus = make_corpus(tmp_path / "two", rows, stages, keep=keep)
    whole = read(corpus)
    # Another corpus enters the index, before this one in its order, with a text of many
    # passages.
    name = next(iter(whole))
    make_corpus(tmp_path / "one", [row for row in rows if row["id"] == name], stages)
    entry = max((tmp_path / "index").glob("*.digests"))
    entry.rename(entry.with_name(f"000000{entry.name[6:]}"))
    shutil.rmtree(corpus.folder / "exact")
    corpus = make_corpus(tmp_path / "two", rows, stages, keep=keep)
    again = read(corpus)
    assert name not in again
    labels = read_labels(corpus.settle_rules(corpus.resolve_rules()))
    assert find_lost(rows, list_kept_alone(corpus, keep), again, labels) == ([], [])
