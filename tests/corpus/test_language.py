"""Languages are told by fastText, for documents and for their paragraphs."""

from itertools import pairwise

import fasttext
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.corpus.stages.language import LanguageStage, find_shipped_model

TEXTS = {
    "en": "The harbour was quiet when the first boats came back, and nobody expected "
    "them yet.",
    "de": "Am frühen Morgen lag der Hafen noch still, und niemand hatte Boote so früh "
    "erwartet.",
    "fr": "Le port était encore calme lorsque les premiers bateaux sont rentrés plus "
    "tôt hier.",
    "es": "El puerto todavía estaba tranquilo cuando volvieron temprano los primeros "
    "barcos.",
    "it": "Il porto era ancora tranquillo quando le prime barche tornarono prima del "
    "previsto.",
    "pt": "O porto ainda estava calmo quando os primeiros barcos voltaram mais cedo "
    "que o normal.",
    "nl": "De haven was nog stil toen de eerste boten terugkwamen, eerder dan iemand "
    "had verwacht.",
    "pl": "Port był jeszcze cichy, kiedy pierwsze łodzie wróciły wcześniej niż zwykle.",
    "ru": "Гавань была ещё тиха, когда первые лодки вернулись раньше, чем кто-либо мог "
    "ожидать.",
    "el": "Το λιμάνι ήταν ακόμη ήσυχο όταν γύρισαν οι πρώτες βάρκες νωρίτερα από ό,τι "
    "περίμεναν.",
    "ja": "最初の船が予想よりも早く戻ってきたとき、港はまだ静かで、誰もそれを待っていなかった。",
    "zh": "第一批船比预想的更早回来的时候，港口还很安静，没有人想到它们会这么快回来。",
    "ar": "كان الميناء لا يزال هادئا عندما عادت القوارب الأولى في وقت أبكر مما كان "
    "متوقعا.",
    "ko": "첫 배들이 예상보다 일찍 돌아왔을 때 항구는 아직 조용했고 아무도 기다리지 않았다.",
}


@pytest.fixture(scope="module")
def library():
    return fasttext.load_model(str(find_shipped_model()))


@pytest.fixture(scope="module")
def label():
    return LanguageStage(paragraph_characters=40).make_batch_label_fn()


def rows(label, texts: list[str]) -> list[dict]:
    batch = pa.record_batch({"text": pa.array(texts, pa.large_string())})
    return label(batch).to_pylist()


def predict(library, text: str) -> list[tuple[str, float]]:
    """The library's answer; it reads a line at a time."""
    labels, scores = library.predict(text.replace("\n", " "), k=2)
    names = [label.removeprefix("__label__") for label in labels]
    return list(zip(names, scores, strict=True))


def test_languages_are_told_apart(label):
    for name, row in zip(TEXTS, rows(label, list(TEXTS.values())), strict=True):
        assert (row["name"], row["share"]) == (name, 1)
        assert [span["name"] for span in row["spans"]] == [name]


LETTERS = st.sampled_from(
    [*"abcdeéßñłğ ,.\n\t'0Абвжאבابहिंไทยกあ漢字한글😀\0\x0b", *TEXTS.values()]
)


@given(st.lists(LETTERS, max_size=40).map("".join))
@settings(max_examples=150, deadline=None)
def test_scores_are_the_librarys(library, label, text):
    (row,) = rows(label, [text])
    answers = predict(library, text)
    if row["name"] == "und":
        # Of no n-gram, so the library's answer is that to nothing.
        assert answers == predict(library, "")
        assert row["score"] == 0
        assert row["second"] == "und"
        assert row["spans"] == []
        return
    best = (row["name"], row["score"])
    second = (row["second"], row["second_score"])
    assert [best, second] == answers


@given(st.lists(st.sampled_from([*TEXTS.values(), "ok", "", "123", "  "]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_spans_divide_the_text_and_share_is_the_part_in_its_own_language(label, lines):
    text = "\n".join(lines)
    (row,) = rows(label, [text])
    spans = row["spans"]
    if spans:
        assert (spans[0]["start"], spans[-1]["end"]) == (0, len(text))
    for a, b in pairwise(spans):
        assert a["end"] == b["start"]
        assert a["name"] != b["name"]
        assert text[a["end"] - 1] == "\n"
    in_same = sum(s["end"] - s["start"] for s in spans if s["name"] == row["name"])
    assert row["share"] == (in_same / len(text) if text else 0)


@given(st.lists(st.sampled_from([*TEXTS]), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_spans_are_runs_of_paragraphs_with_the_librarys_scores(library, label, names):
    # Each line is a paragraph, of more than 40 characters; those of ja and zh are left
    # out.
    lines = [TEXTS[name] + "\n" for name in names if name not in ("ja", "zh")]
    (row,) = rows(label, ["".join(lines)])
    if len(lines) < 2:  # The text's own scores.
        return
    expected = []
    place = 0
    for line in lines:
        name, score = predict(library, line)[0]
        if expected and expected[-1][2] == name:
            start, end, _, mean = expected.pop()
            total_score = mean * (end - start) + score * len(line)
            score = total_score / (place + len(line) - start)
        else:
            start = place
        place += len(line)
        expected.append((start, place, name, score))
    spans = [(s["start"], s["end"], s["name"]) for s in row["spans"]]
    assert spans == [span[:3] for span in expected]
    for span, (_, _, _, score) in zip(row["spans"], expected, strict=True):
        assert span["score"] == pytest.approx(score, abs=1e-5)


def test_the_word_that_ends_a_line_for_fasttext_ends_no_text(library, label):
    text = f"{TEXTS['en']} </s> {(TEXTS['de'] + ' ') * 5}"
    assert predict(library, text)[0][0] == "en"
    assert rows(label, [text])[0]["name"] == "de"


def test_confident_means_the_languages_own_threshold():
    def label_text(stage: LanguageStage, text: str) -> dict:
        return rows(stage.make_batch_label_fn(), [text])[0]

    german = TEXTS["de"]
    score = label_text(LanguageStage(), german)["score"]
    below = score - 0.01
    above = min(score + 0.01, 1)
    lower = LanguageStage(default_threshold=1, thresholds={"de": below})
    assert label_text(lower, german)["confident"]
    higher = LanguageStage(default_threshold=0, thresholds={"de": above})
    assert not label_text(higher, german)["confident"]
    other = LanguageStage(default_threshold=below, thresholds={"en": 1})
    assert label_text(other, german)["confident"]
    # An empty text is of no language, however low the threshold.
    assert not label_text(LanguageStage(default_threshold=0), "")["confident"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(MaxlmError, match="no language eng"):
        LanguageStage(thresholds={"eng": 0.5}).make_batch_label_fn()
    with pytest.raises(MaxlmError, match="cannot be opened"):
        LanguageStage(model=str(tmp_path / "no.ftz")).make_batch_label_fn()
    damaged = tmp_path / "damaged.ftz"
    damaged.write_bytes(b"no model at all")
    with pytest.raises(MaxlmError, match="no fastText model"):
        LanguageStage(model=str(damaged)).make_batch_label_fn()
