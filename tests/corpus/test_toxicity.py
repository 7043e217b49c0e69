"""The toxicity stage: listed words are counted, and the classifier is the package's own."""

import re
from importlib import resources

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.corpus.stages.toxicity import ToxicityStage, chunk_text, read_lists

LISTS = resources.files("maxlm.corpus") / "lists" / "toxic"


def label(stage: ToxicityStage, *texts: str | None) -> list[dict]:
    batch = pa.RecordBatch.from_pydict({"text": pa.array(texts, pa.large_string())})
    labels = stage.open()(batch)
    assert labels.schema == stage.schema()
    return labels.to_pylist()


def words_stage(tmp_path, *phrases: str, **settings) -> ToxicityStage:
    path = tmp_path / "list.txt"
    path.write_text("# a comment\n\n" + "\n".join(phrases), encoding="utf-8")
    return ToxicityStage(classifier=False, lists=(str(path),), **settings)


def test_listed_words_are_counted_and_only_whole_ones(tmp_path):
    stage = words_stage(tmp_path, "grut", "big grut", "f*nk", "ÄRGER", "don't", "悪い")
    rows = label(
        stage,
        "Grut, GRUT! A big  grut\nis no grutten: bigrut, grut's.",
        "So f*nk it; f nk and f**nk do not count. Großer Ärger, ärger!",
        "don't do n't don t",
        "それは悪いことだ。悪 い",
        "nothing here",
        "",
    )
    # The longest phrase at each place: "big grut" is one.
    assert [row["words"] for row in rows] == [4, 3, 1, 2, 0, 0]
    assert rows[0]["word_ratio"] == 4 / 11
    assert [row["word_ratio"] for row in rows[4:]] == [0, None]
    assert all(row["score"] is None and row["max_score"] is None for row in rows)


@given(st.lists(st.sampled_from(["ape", "bee", "cow", "dog", "Ape", "COW"]), max_size=30))
def test_counting_words_and_phrases_against_a_regular_expression(tmp_path_factory, words):
    stage = words_stage(
        tmp_path_factory.mktemp("lists"), "ape", "ape cow", "bee cow", "bee cow dog", "cow"
    )
    pattern = r"\b(ape cow|ape|bee cow dog|bee cow|cow)\b"
    text = " ".join(words)
    assert label(stage, text)[0]["words"] == len(re.findall(pattern, text.lower()))


def test_only_the_beginning_of_a_long_text_is_looked_at(tmp_path):
    stage = words_stage(tmp_path, "grut", longest=1000)
    assert label(stage, "grut " * 300)[0]["words"] == 200


def test_shipped_lists():
    names = sorted(each.name for each in LISTS.iterdir())
    assert names == ["de.txt", "en.txt", "es.txt", "fr.txt"]
    for name in names:
        lines = (LISTS / name).read_text("utf-8").splitlines()
        phrases = [line for line in lines if line and not line.startswith("#")]
        assert len(phrases) >= 40
        assert len(set(phrases)) == len(phrases)
        assert all(phrase == phrase.strip().lower() for phrase in phrases)
        stage = ToxicityStage(classifier=False, lists=(name.removesuffix(".txt"),))
        assert label(stage, " | ".join(phrases))[0]["words"] == len(phrases)
    both = read_lists(("de", "fr"))
    assert set(both) == set(read_lists(("de",))) | set(read_lists(("fr",)))


def test_a_list_that_cannot_be_read(tmp_path):
    with pytest.raises(MaxlmError, match=r"'xx'.*one of: de, en, es, fr"):
        ToxicityStage(lists=("xx",)).open()
    path = tmp_path / "latin.txt"
    path.write_bytes("Scheiß".encode("latin-1"))
    with pytest.raises(MaxlmError, match="cannot read the list"):
        ToxicityStage(lists=(str(path),)).key()


def test_another_list_is_another_key(tmp_path):
    stage = words_stage(tmp_path, "one")
    first = stage.key()
    assert words_stage(tmp_path, "two").key() != first
    assert words_stage(tmp_path, "one").key() == first


def test_the_score_is_the_packages_own():
    from profanity_check import predict_prob

    texts = [
        "You are a wonderful person, thank you for the help.",
        "you stupid fucking idiot, shut up",
        "dick van dyke",
        "12345",
    ]
    rows = label(ToxicityStage(), *texts)
    for row, wanted in zip(rows, predict_prob(texts), strict=True):
        assert row["score"] == row["max_score"] == np.float32(wanted)
    assert rows[0]["score"] < 0.2
    # As the docstring warns: single words decide.
    assert rows[1]["score"] > 0.95
    assert rows[2]["score"] > 0.95
    assert label(ToxicityStage(), "", None)[0]["score"] is None
    assert label(ToxicityStage()) == []


def test_a_long_text_is_judged_in_chunk_text():
    from profanity_check import predict_prob

    calm, rude = "The committee met on Tuesday. " * 60, "you stupid fucking idiot "
    text = calm + rude * 10 + calm
    stage = ToxicityStage(chunk=500)
    parts = list(chunk_text(text, 500))
    assert len(parts) == 8
    scores = predict_prob(parts)
    row, other = label(stage, text, calm)
    assert np.isclose(row["score"], np.mean(scores))
    assert np.isclose(row["max_score"], np.max(scores))
    assert row["max_score"] > 0.9 > 0.5 > row["score"]
    assert other["max_score"] < 0.2


@given(st.text(alphabet="ab \n日", max_size=400), st.integers(1, 50))
def test_chunks_are_the_text(text, size):
    parts = list(chunk_text(text, size))
    assert "".join(parts) == text
    assert all(parts)
    assert all(len(part) <= size + size // 4 + 1 for part in parts)
