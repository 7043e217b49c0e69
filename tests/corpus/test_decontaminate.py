"""Decontamination against a search for n-grams as tuples of words."""

import json
import random
import unicodedata
from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.corpus.stages.decontaminate import (
    DecontaminateStage,
    count_contaminated_documents,
)
from maxlm.data.documents.config import SourceConfig
from tests.corpus.corpora import labels, make_corpus, run_stage

CHANCE = random.Random(0)


def sentence(number: int) -> list[str]:
    return [f"word{CHANCE.randrange(10**6)}" for _ in range(number)]


def write_set(path: Path, items: list[str]) -> SourceConfig:
    path.write_text("".join(json.dumps({"text": item}) + "\n" for item in items))
    return SourceConfig(documents=(str(path),))


def grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_documents_are_marked_by_their_longest_part_of_an_item(tmp_path: Path) -> None:
    items = [sentence(length) for length in (40, 13, 12, 8, 7, 30)]
    filler = [sentence(50) for _ in range(40)]
    documents = []
    for text in filler:
        item = CHANCE.choice(items)
        start = CHANCE.randrange(len(item))
        part = item[start : start + CHANCE.randrange(len(item) + 1)]
        place = CHANCE.randrange(50)
        documents.append(text[:place] + part + text[place:])
    documents += [
        items[0] + filler[0] + items[1],
        items[2] * 2,
        items[4],
        items[0][:12],
    ]
    item_texts = [" ".join(item) for item in items]
    stage = DecontaminateStage(
        sets={
            "first": write_set(tmp_path / "first.jsonl", item_texts[:5]),
            "second": write_set(tmp_path / "second.jsonl", item_texts[5:]),
        }
    )
    written = ["; ".join(document).upper() + "." for document in documents]
    shards = make_corpus(tmp_path / "corpus", written)
    run_stage(stage, shards, tmp_path / "scratch")
    contaminated = 0
    for words, label in zip(documents, labels(shards, stage).to_pylist(), strict=True):
        # The defaults: n-grams of 13 words, and nothing of items shorter than 8.
        overlaps = []
        for number, item in enumerate(items):
            n = min(13, len(item))
            item_grams = grams(item, n)
            num_shared = len(item_grams & grams(words, n)) if n >= 8 else 0
            # Of equal overlaps the first item is taken.
            overlaps.append((num_shared / len(item_grams), num_shared, -number))
        overlap, num_shared, minus_number = max(overlaps)
        contaminated += label["contaminated"]
        assert label["contaminated"] == (num_shared > 0)
        assert label["overlap"] == pytest.approx(overlap)
        if num_shared == 0:
            assert label["set"] is label["item"] is None
            continue
        number = -minus_number
        if number == 5:
            name = "second"
            line = 1
        else:
            name = "first"
            line = number + 1
        assert label["set"] == name
        assert label["item"] == f"{tmp_path}/{name}.jsonl:{line}"
    assert 5 < contaminated < 40
    counts = count_contaminated_documents(stage, shards)
    assert sum(count["documents"] for count in counts) == contaminated
    assert counts == sorted(counts, key=lambda count: -count["documents"])


def test_cuts_are_the_characters_of_what_was_found(tmp_path: Path) -> None:
    item = "Où est-ce que le petit café d’été, 日本 — c'est ici?"
    text = f"Ça ☃ va. {item} Non, {item[:-5]}\x00 😀 fin"
    questions = write_set(tmp_path / "q.jsonl", [item])
    stage = DecontaminateStage(sets={"q": questions}, ngram=8)
    shards = make_corpus(tmp_path / "corpus", [text, "nothing", "", None])
    run_stage(stage, shards, tmp_path / "scratch")
    rows = labels(shards, stage).to_pylist()
    cuts = [text[span["start"] : span["end"]] for span in rows[0]["cuts"]]
    assert cuts == [item[:-1], item[:-5].rstrip()]
    assert rows[0]["overlap"] == 1
    assert [row["cuts"] for row in rows[1:]] == [[], [], None]


def test_min_hits_and_templates(tmp_path: Path) -> None:
    template = sentence(15)
    items = [[*template, *sentence(20)] for _ in range(12)]
    other = sentence(20)
    questions = [" ".join(words) for words in [*items, other]]
    sets = {"q": write_set(tmp_path / "q.jsonl", questions)}
    texts = [" ".join(words) for words in (template, items[3], other[:14], other[:13])]
    shards = make_corpus(tmp_path / "corpus", texts)
    for stage, expected in (
        (DecontaminateStage(sets=sets), [False, True, True, True]),
        (DecontaminateStage(sets=sets, min_hits=2), [False, True, True, False]),
        (DecontaminateStage(sets=sets, max_items=20), [True, True, True, True]),
    ):
        run_stage(stage, shards, tmp_path / "scratch")
        assert labels(shards, stage)["contaminated"].to_pylist() == expected
    expected_count = {
        "set": "q",
        "item": f"{tmp_path}/q.jsonl:4",
        "documents": 1,
        "overlap": 1.0,
    }
    assert expected_count in count_contaminated_documents(stage, shards)


def contaminated(tmp_path: Path, items: list[str], texts: list[str]) -> list[bool]:
    stage = DecontaminateStage(sets={"q": write_set(tmp_path / "q.jsonl", items)})
    shards = make_corpus(tmp_path / "corpus", texts)
    run_stage(stage, shards, tmp_path / "scratch")
    return labels(shards, stage)["contaminated"].to_pylist()


def test_a_passage_of_many_questions_is_looked_for_and_how_they_are_asked_is_not(
    tmp_path: Path,
) -> None:
    template = sentence(15)
    instructions = sentence(60)
    passages = [sentence(60) for _ in range(3)]
    questions = [
        [*instructions, *passage, *template, *sentence(9)]
        for passage in passages
        for _ in range(12)
    ]
    texts = [
        template,
        instructions,
        passages[1],
        [*sentence(30), *passages[2][20:34], *sentence(30)],
        [*template, *questions[3][-9:]],
    ]
    question_texts = [" ".join(words) for words in questions]
    document_texts = [" ".join(words) for words in texts]
    verdicts = contaminated(tmp_path, question_texts, document_texts)
    assert verdicts == [False, False, True, True, True]


@pytest.mark.parametrize(
    "item",
    [
        "다람쥐 헌 쳇바퀴에 타고파 한국어 문서는 여러 낱말로 되어 있다",
        "がぎぐげご、ガギグゲゴとパピプペポ",
        "آب أحمد إلى مؤمن سائل آخر أمس إن",
    ],
)
def test_texts_in_nfc_and_in_nfd_have_the_same_words(item: str, tmp_path: Path) -> None:
    composed = unicodedata.normalize("NFC", item)
    decomposed = unicodedata.normalize("NFD", item)
    assert composed != decomposed
    forms = [composed, decomposed, item]
    for form in forms:
        assert contaminated(tmp_path, [form], forms) == [True] * 3
    changed = composed.replace(composed[0], "xyz")
    assert contaminated(tmp_path, [decomposed], [changed]) == [False]


def test_sets_without_anything_to_look_for(tmp_path: Path) -> None:
    for items, message in (
        (["too short"], "no text of 8 words"),
        ([], "no text of 8 words"),
    ):
        too_short = write_set(tmp_path / "q.jsonl", items)
        stage = DecontaminateStage(sets={"q": too_short})
        with pytest.raises(MaxlmError, match=message):
            stage.make_batch_label_fn()
    items = write_set(tmp_path / "q.jsonl", ["one two", "two three", "three one"])
    common = DecontaminateStage(sets={"q": items}, ngram=1, shortest=1, max_items=1)
    with pytest.raises(MaxlmError, match="common to more than 1 items"):
        common.make_batch_label_fn()
