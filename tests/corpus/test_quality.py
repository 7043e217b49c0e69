"""The quality classifier: trained, calibrated, measured and saved as it says; and its
stage."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics

from maxlm.config import MaxlmError
from maxlm.corpus.stages.quality import (
    ClassifierConfig,
    QualityStage,
    load_classifier,
    train_classifier,
)
from maxlm.data.documents.document import is_heldout
from tests.corpus.corpora import label_texts

GOOD = "because however which although people history idea reason often never question"
BAD = "buy click cheap subscribe offer login cookie banner discount menu cart now"
BOTH = "the a of and to in is it that for on with as was at by this are"


def texts(words: str, number: int, seed: int, share: float = 0.15) -> list[bytes]:
    """Documents of 40 words, `share` of them out of `words`, the rest out of `BOTH`."""
    generator = np.random.default_rng(seed)
    picks = np.where(
        generator.random((number, 40)) < share,
        generator.choice(words.split(), (number, 40)),
        generator.choice(BOTH.split(), (number, 40)),
    )
    return [" ".join(row).encode() for row in picks]


@pytest.fixture(scope="module")
def trained():
    good = texts(GOOD, 600, 0)
    bad = texts(BAD, 400, 1)
    return train_classifier(good, bad, ClassifierConfig(buckets=14)), good, bad


def probability(model, *documents: str | bytes) -> np.ndarray:
    decoded = [
        text if isinstance(text, str) else text.decode("utf-8", "replace")
        for text in documents
    ]
    return model.predict_proba(decoded)


def test_it_tells_the_kinds_apart_on_documents_it_never_saw(trained):
    (model, report), good, bad = trained
    assert report.roc_auc > 0.97
    assert report.precision > 0.85
    assert report.recall > 0.8
    fresh_good = probability(model, *texts(GOOD, 200, 7))
    fresh_bad = probability(model, *texts(BAD, 200, 8))
    fresh = np.concatenate([fresh_good, fresh_bad])
    labels = np.arange(400) < 200
    assert metrics.roc_auc_score(labels, fresh) > 0.97

    # Of the fifth that is held out, one half calibrates, the other measures.
    num_trained_good = sum(not is_heldout(text, 0.2) for text in good)
    num_trained_bad = sum(not is_heldout(text, 0.2) for text in bad)
    unseen_good = [text for text in good if is_heldout(text, 0.1)]
    unseen_bad = [text for text in bad if is_heldout(text, 0.1)]
    assert report.trained == (num_trained_good, num_trained_bad)
    assert report.measured == (len(unseen_good), len(unseen_bad))
    scores = probability(model, *unseen_good, *unseen_bad)
    truth = np.arange(len(scores)) < len(unseen_good)
    assert report.roc_auc == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert report.recall == np.mean(scores[truth] >= model.threshold)
    assert f"ROC AUC      {report.roc_auc:.4f}" in str(report)
    missed = str(replace(report, reached=False, conflicts=3))
    assert "NOT reached" in missed
    assert "3 that are among both" in missed


def test_scores_are_probabilities_where_kinds_overlap():
    # Of the documents that say "ham" 70% are positive, of those that say "spam" 20%.
    generator = np.random.default_rng(0)
    sides: dict[bool, list[bytes]] = {True: [], False: []}
    for i in range(1600):
        word, share = (("ham", 0.7), ("spam", 0.2))[i % 2]
        is_positive = bool(generator.random() < share)
        sides[is_positive].append(f"{word} {i}".encode())
    settings = ClassifierConfig(word_ngrams=1, heldout=0.5, buckets=14)
    model, _ = train_classifier(sides[True], sides[False], settings)
    ham = probability(model, *[f"ham {i}" for i in range(9000, 9200)])
    spam = probability(model, *[f"spam {i}" for i in range(9000, 9200)])
    assert abs(ham.mean() - 0.7) < 0.1
    assert abs(spam.mean() - 0.2) < 0.1


def test_what_is_among_both_is_left_out():
    good = texts(GOOD, 200, 0)
    bad = texts(BAD, 200, 1)
    _, report = train_classifier(good + bad[:20], bad, ClassifierConfig(buckets=12))
    assert report.conflicts == 40
    assert report.trained[0] == sum(not is_heldout(text, 0.2) for text in good)


def test_too_few_documents():
    with pytest.raises(MaxlmError, match="0 positive documents"):
        train_classifier([], texts(BAD, 50, 0), ClassifierConfig())
    with pytest.raises(MaxlmError, match=r"2 negative documents.*give more documents"):
        train_classifier(texts(GOOD, 50, 0), [b"x", b"y"], ClassifierConfig())


def test_a_saved_model_gives_the_same_scores(trained, tmp_path):
    (model, _), good, _ = trained
    path = tmp_path / "models" / "quality.safetensors"
    model.save(path)
    again = load_classifier(path)
    np.testing.assert_array_equal(
        probability(again, *good[:50]), probability(model, *good[:50])
    )
    assert again.threshold == model.threshold
    assert again.settings == model.settings
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert "weights" in json.loads(path.read_bytes()[8 : 8 + size])


def test_a_file_that_is_no_model(trained, tmp_path):
    (model, _), _, _ = trained
    path = tmp_path / "quality.safetensors"
    with pytest.raises(MaxlmError, match=r"no classifier .*maxlm corpus train-quality"):
        load_classifier(path)
    model.save(path)
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"{}",
        whole[:-10],
        whole.replace(b"word_ngrams", b"word_ngrims"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(MaxlmError, match="holds no classifier"):
            load_classifier(path)
    replace(model, weights=model.weights[:-1]).save(path)
    with pytest.raises(MaxlmError, match="holds no classifier"):
        load_classifier(path)


def test_the_stage(trained, tmp_path):
    (model, _), good, bad = trained
    path = tmp_path / "quality.safetensors"
    stage = QualityStage(model=path)
    for call in (stage.fingerprint, stage.make_batch_label_fn):
        with pytest.raises(MaxlmError, match="train one: maxlm corpus train-quality"):
            call()
    model.save(path)
    first = stage.fingerprint()
    replace(model, offset=model.offset + 1).save(path)
    assert stage.fingerprint() != first
    model.save(path)
    strange = ["", " \n", "\x00", "日本語 😀", "x" * 1_500_000]
    rows = [good[0].decode(), bad[0].decode(), *strange]
    scores = [labels["score"] for labels in label_texts(stage, *rows)]
    np.testing.assert_allclose(scores[:2], probability(model, *rows[:2]), rtol=1e-6)
    assert scores[2:5] == [None] * 3
    assert all(0 <= score <= 1 for score in scores[5:])
