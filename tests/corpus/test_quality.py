"""The quality classifier: trained, calibrated, measured and saved as it says; and its stage."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn import metrics

from maxlm.config import MaxlmError
from maxlm.corpus.classifier import (
    ClassifierConfig,
    ClassifierTraining,
    _platt,
    load_classifier,
    train_classifier,
    train_from_sources,
)
from maxlm.corpus.classifier_report import Report, roc_curve, suggest_threshold
from maxlm.corpus.stages.quality import QualityStage
from maxlm.corpus.textbuffers import pack_texts
from maxlm.data.documents import SourceConfig, is_heldout

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
    good, bad = texts(GOOD, 600, 0), texts(BAD, 400, 1)
    return train_classifier(good, bad, ClassifierConfig(buckets=14)), good, bad


def probability(model, *documents: str | bytes) -> np.ndarray:
    raw = [text.encode() if isinstance(text, str) else text for text in documents]
    return model.predict(*pack_texts(raw))


def test_it_tells_the_kinds_apart_on_documents_it_never_saw(trained):
    (model, report), good, bad = trained
    assert report.roc_auc > 0.97
    assert report.precision > 0.85
    assert report.recall > 0.8
    assert report.calibration_error < 0.1
    fresh = np.concatenate(
        [probability(model, *texts(GOOD, 200, 7)), probability(model, *texts(BAD, 200, 8))]
    )
    labels = np.arange(400) < 200
    assert metrics.roc_auc_score(labels, fresh) > 0.97
    unseen = [text for text in good + bad if is_heldout(text, 0.1)]
    assert len(report.scores) == len(unseen)
    np.testing.assert_allclose(probability(model, *unseen), report.scores)
    known = sum(not is_heldout(text, 0.2) for text in good)
    assert report.trained == (known, sum(not is_heldout(text, 0.2) for text in bad))


def test_training_is_the_same_every_time(trained):
    (model, _), good, bad = trained
    again, _ = train_classifier(iter(good), iter(bad), model.settings)
    assert again.weights.tobytes() == model.weights.tobytes()
    assert (again.scale, again.offset, again.threshold) == (
        model.scale, model.offset, model.threshold,
    )  # fmt: skip


def test_a_text_scores_the_mean_of_its_words():
    settings = ClassifierConfig(buckets=14, word_ngrams=1)
    model, _ = train_classifier(texts(GOOD, 300, 0), texts(BAD, 300, 1), settings)

    def logit(text: str) -> float:
        p = probability(model, text)[0]
        return np.log(p / (1 - p))

    words = ["because", "click", "the", "reason", "menu"]
    mean = np.mean([logit(word) for word in words])
    assert np.isclose(logit(" ".join(words)), mean)
    assert logit("because") > logit("the") > logit("click")
    assert logit("BECAUSE  Reason\n") == logit("because reason")


def test_pairs_and_characters_tell_what_words_cannot():
    ab = [f"{x} a b {y}".encode() for x in range(30) for y in range(10)]
    ba = [f"{x} b a {y}".encode() for x in range(30) for y in range(10)]
    for ngrams, auc in ((1, 0.65), (2, 0.99)):
        _, report = train_classifier(ab, ba, ClassifierConfig(word_ngrams=ngrams, buckets=16))
        assert (report.roc_auc > 0.98) == (auc > 0.98)
    inside = [f"q{x}zomq{x}".encode() for x in range(300)]
    other = [f"q{x}mozq{x}".encode() for x in range(300)]
    scores = [
        train_classifier(inside, other, ClassifierConfig(char_ngrams=n))[1].roc_auc for n in (0, 3)
    ]
    assert scores[0] < 0.7
    assert scores[1] > 0.99


def test_scores_are_probabilities_where_kinds_overlap():
    # Of the documents that say "ham" 70% are positive, of those that say "spam" 20%.
    generator = np.random.default_rng(0)
    sides: dict[bool, list[bytes]] = {True: [], False: []}
    for i in range(4000):
        word, share = (("ham", 0.7), ("spam", 0.2))[i % 2]
        sides[bool(generator.random() < share)].append(f"{word} {i}".encode())
    settings = ClassifierConfig(word_ngrams=1, epochs=1, heldout=0.5)
    model, report = train_classifier(sides[True], sides[False], settings)
    assert abs(report.calibration_error) < 0.06
    fresh = probability(model, *[f"{w} {i}" for w in ("ham", "spam") for i in range(9000, 9500)])
    assert abs(fresh[:500].mean() - 0.7) < 0.06
    assert abs(fresh[500:].mean() - 0.2) < 0.06


def test_platt_finds_the_minimum():
    generator = np.random.default_rng(3)
    means = generator.normal(size=200) * 1e-3
    labels = means * 2000 + generator.normal(size=200) > 0.5
    positive, negative = labels.sum(), (~labels).sum()
    target = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(beta):
        z = beta[0] * means * 1e3 + beta[1]
        return np.sum(np.logaddexp(0, z) - target * z)

    wanted = minimize(loss, [0, 0]).x
    scale, offset = _platt(means, labels)
    np.testing.assert_allclose([scale / 1e3, offset], wanted, rtol=1e-3, atol=1e-3)
    for separable in (means > 0, np.arange(200) < 1, np.arange(200) > 0):
        assert np.isfinite(_platt(means, separable)).all()
    assert np.isfinite(_platt(np.zeros(200), labels)).all()


scored = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans()), min_size=2)
scored = scored.filter(lambda rows: len({label for _, label in rows}) == 2)


@given(scored, st.sampled_from(["precision", "recall"]), st.sampled_from([0.3, 0.75, 1.0]))
@settings(deadline=None)
def test_figures_and_threshold_against_brute_force(rows, target, value):
    scores, labels = (np.array(each) for each in zip(*rows, strict=True))
    report = Report((1, 1), 0, scores, labels, 0.5, True, "")
    assert np.isclose(report.roc_auc, metrics.roc_auc_score(labels, scores))
    assert np.isclose(report.brier, metrics.brier_score_loss(labels, scores))
    wanted = metrics.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(scores, labels), wanted[:2], strict=True):
        np.testing.assert_allclose(ours, theirs)
    taken = scores >= 0.5
    precision = metrics.precision_score(labels, taken, zero_division=1.0)  # pyright: ignore
    assert np.isclose(report.precision, precision)
    assert np.isclose(report.recall, metrics.recall_score(labels, taken))

    def figures(threshold: float) -> tuple[float, float]:
        each = replace(report, threshold=threshold)
        if target == "precision":
            return each.precision, each.recall
        return each.recall, each.precision

    threshold, reached = suggest_threshold(scores, labels, target, value)
    every = [figures(t) for t in sorted(set(scores))]
    assert reached == any(this >= value for this, _ in every)
    this, other = figures(threshold)
    if reached:
        assert this >= value
        assert np.isclose(other, max(o for t, o in every if t >= value))
    else:
        assert np.isclose(this, max(t for t, _ in every))


def test_report_reads_well(trained):
    (_, report), _, _ = trained
    text = str(report)
    assert f"ROC AUC      {report.roc_auc:.4f}" in text
    assert "for precision 0.9" in text
    assert "NOT reached" not in text
    missed = str(replace(report, reached=False, conflicts=3))
    assert "NOT reached" in missed
    assert "3 that are among both" in missed


def test_what_is_among_both_is_left_out():
    good, bad = texts(GOOD, 200, 0), texts(BAD, 200, 1)
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
    np.testing.assert_array_equal(probability(again, *good[:50]), probability(model, *good[:50]))
    assert again.threshold == model.threshold
    assert again.settings == model.settings
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert "weights" in json.loads(path.read_bytes()[8 : 8 + size])


def test_a_model_that_cannot_be_written_or_read(trained, tmp_path, monkeypatch):
    (model, _), _, _ = trained
    (tmp_path / "folder").mkdir()
    with pytest.raises(MaxlmError, match="cannot write"):
        model.save(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    with pytest.raises(MaxlmError, match="cannot write"):
        model.save(Path("/proc/none/model"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (model.save, load_classifier):
        with pytest.raises(MaxlmError, match=r"maxlm\[corpus\]"):
            call(tmp_path / "model")


def test_a_file_that_is_no_model(trained, tmp_path):
    (model, _), _, _ = trained
    path = tmp_path / "quality.safetensors"
    with pytest.raises(MaxlmError, match=r"no classifier .*maxlm corpus train-quality"):
        load_classifier(path)
    model.save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"{}", whole[:-10], whole.replace(b"word_ngrams", b"word_ngrims")):
        path.write_bytes(damaged)
        with pytest.raises(MaxlmError, match="holds no classifier"):
            load_classifier(path)
    replace(model, weights=model.weights[:-1]).save(path)
    with pytest.raises(MaxlmError, match="holds no classifier"):
        load_classifier(path)


def test_the_stage(trained, tmp_path):
    (model, _), good, bad = trained
    path = tmp_path / "quality.safetensors"
    model.save(path)
    stage = QualityStage(model=path)
    strange = ["", " \n", "\x00", "日本語 😀", "x" * 1_500_000]
    rows = [good[0].decode(), bad[0].decode(), *strange]
    batch = pa.RecordBatch.from_pydict({"text": pa.array(rows, pa.large_string())})
    labels = stage.open()(batch)
    assert labels.schema == stage.schema()
    scores = labels.column("score").to_pylist()
    np.testing.assert_allclose(scores[:2], probability(model, *rows[:2]), rtol=1e-6)
    assert scores[2:4] == [None, None]
    assert all(0 <= score <= 1 for score in scores[4:])


def test_another_model_is_another_key(trained, tmp_path):
    (model, _), _, _ = trained
    path = tmp_path / "quality.safetensors"
    stage = QualityStage(model=path)
    with pytest.raises(MaxlmError, match="maxlm corpus train-quality"):
        stage.key()
    with pytest.raises(MaxlmError, match=r"quality: .*train one: maxlm corpus train-quality"):
        stage.open()
    model.save(path)
    first = stage.key()
    assert stage.key() == first
    replace(model, offset=model.offset + 1).save(path)
    assert stage.key() != first


def test_training_from_files_and_bytes_that_are_no_utf8(tmp_path):
    for name, words in (("good", GOOD), ("bad", BAD)):
        lines = [json.dumps({"text": text.decode()}) for text in texts(words, 100, 5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "broken.txt").write_bytes(b"cheap \xff\xfe cart \xe2\x82")
    training = ClassifierTraining(
        positive=SourceConfig(documents=(str(tmp_path / "good.jsonl"),)),
        negative=SourceConfig(
            documents=(str(tmp_path / "bad.jsonl"), str(tmp_path / "more")), on_bad_bytes="keep"
        ),
        model=ClassifierConfig(buckets=12, heldout=0.4),
    )
    model, report = train_from_sources(training)
    assert report.roc_auc > 0.9
    assert sum(report.trained) + len(report.scores) < 201
    assert probability(model, b"cheap \xff\xfe cart \xe2\x82")[0] < 0.5
