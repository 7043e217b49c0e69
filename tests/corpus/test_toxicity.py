"""The toxicity stage: listed words are counted, and the classifier is the package's
own."""

from importlib import resources

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.corpus.stages.toxicity import ToxicityStage, chunk_text, read_word_lists
from tests.corpus.corpora import label_texts

LISTS = resources.files("maxlm.corpus") / "lists" / "toxic"


def words_stage(tmp_path, *phrases: str) -> ToxicityStage:
    path = tmp_path / "list.txt"
    path.write_text("# a comment\n\n" + "\n".join(phrases), encoding="utf-8")
    return ToxicityStage(classifier=False, lists=(str(path),))


def test_listed_words_are_counted_and_only_whole_ones(tmp_path):
    stage = words_stage(tmp_path, "grut", "big grut", "f*nk", "ÄRGER", "don't", "悪い")
    rows = label_texts(
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


def test_shipped_lists():
    names = sorted(path.name for path in LISTS.iterdir())
    assert names == ["de.txt", "en.txt", "es.txt", "fr.txt"]
    for name in names:
        lines = (LISTS / name).read_text("utf-8").splitlines()
        phrases = [line for line in lines if line and not line.startswith("#")]
        assert len(phrases) >= 40
        assert len(set(phrases)) == len(phrases)
        assert all(phrase == phrase.strip().lower() for phrase in phrases)
        stage = ToxicityStage(classifier=False, lists=(name.removesuffix(".txt"),))
        assert label_texts(stage, " | ".join(phrases))[0]["words"] == len(phrases)
    both = read_word_lists(("de", "fr"))
    assert set(both) == set(read_word_lists(("de",))) | set(read_word_lists(("fr",)))


def test_a_list_that_cannot_be_read(tmp_path):
    with pytest.raises(MaxlmError, match=r"'xx'.*one of: de, en, es, fr"):
        ToxicityStage(lists=("xx",)).make_batch_label_fn()
    path = tmp_path / "latin.txt"
    path.write_bytes("Scheiß".encode("latin-1"))
    with pytest.raises(MaxlmError, match="cannot read the list"):
        ToxicityStage(lists=(str(path),)).fingerprint()


def test_the_score_is_the_packages_own():
    from profanity_check import predict_prob

    texts = [
        "You are a wonderful person, thank you for the help.",
        "you stupid fucking idiot, shut up",
        "dick van dyke",
        "12345",
    ]
    rows = label_texts(ToxicityStage(), *texts)
    for row, probability in zip(rows, predict_prob(texts), strict=True):
        assert row["score"] == row["max_score"] == np.float32(probability)
    assert rows[0]["score"] < 0.2
    # As the docstring warns: single words decide.
    assert rows[1]["score"] > 0.95
    assert rows[2]["score"] > 0.95
    assert label_texts(ToxicityStage(), "", None)[0]["score"] is None
    assert label_texts(ToxicityStage()) == []


def test_a_long_text_is_judged_in_chunk_text():
    from profanity_check import predict_prob

    calm = "The committee met on Tuesday. " * 60
    rude = "you stupid fucking idiot "
    text = calm + rude * 10 + calm
    stage = ToxicityStage(chunk=500)
    parts = list(chunk_text(text, 500))
    assert len(parts) == 8
    scores = predict_prob(parts)
    row, other = label_texts(stage, text, calm)
    assert np.isclose(row["score"], np.mean(scores))
    assert np.isclose(row["max_score"], np.max(scores))
    assert row["max_score"] > 0.9 > 0.5 > row["score"]
    assert other["max_score"] < 0.2
