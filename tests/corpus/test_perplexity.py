"""Perplexities of documents: KenLM's own figures, models, cutoffs, and the stage's
labels."""

from collections import Counter
from itertools import pairwise
from math import log10
from pydoc_data.topics import topics

import kenlm
import numpy as np
import pyarrow as pa
import pytest

from maxlm.config import MaxlmError
from maxlm.corpus.kneser_ney import KneserNeyConfig
from maxlm.corpus.perplexity_model import (
    PerplexityCalibrationConfig,
    PerplexityTrainingConfig,
    calibrate_perplexity,
    open_perplexity_model,
    read_perplexity_metadata,
    train_perplexity,
)
from maxlm.corpus.stages.perplexity import PerplexityStage
from maxlm.corpus.text import LineSplitterConfig, make_line_splitter

# The reference manual of the running Python: half a megabyte of English.
PARAGRAPHS = [
    p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 300
]


def lines(text):
    return list(make_line_splitter(LineSplitterConfig())(text))


def write_arpa(path, texts):
    """A bigram model with absolute discounting of 0.4, and backoffs of 0.4."""
    sentences = [
        ["<s>", *line.split(), "</s>"] for text in texts for line in lines(text)
    ]
    words = Counter(word for sentence in sentences for word in sentence)
    pairs = Counter(pair for sentence in sentences for pair in pairwise(sentence))
    rows = ["\\data\\", f"ngram 1={len(words) + 1}", f"ngram 2={len(pairs)}", ""]
    rows += ["\\1-grams:", "-7\t<unk>\t0"]
    for word, count in words.items():
        rows.append(f"{log10(count / words.total()):.6f}\t{word}\t-0.4")
    rows += ["", "\\2-grams:"]
    for (first, second), count in pairs.items():
        probability = (count - 0.4) / words[first]
        rows.append(f"{log10(probability):.6f}\t{first} {second}")
    rows += ["", "\\end\\", ""]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    return write_arpa(tmp_path_factory.mktemp("model") / "en.arpa", PARAGRAPHS[:-200])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat's 27 hats, in 1984!\n", ["the cat ' s 00 hats , in 0000 !"]),
        ("  two\n\n \r\nlines\t here ", ["two", "lines here"]),
        ("Déjà—vu… «Ωμέγα» Йод", ['deja - vu . . . " ωμεγα " иод']),
        ("ﬁne１２：Ａ\u00a0b", ["fine00 : a b"]),
        ("我爱北京。ひらカタ\u3000x", ["我 爱 北 京 . ひ ら カ タ x"]),
        ("कि नमस्ते। مَرْحَبا، ٣", ["कि नमस्ते . مَرْحَبا , 0"]),
        ("สวัสดี", ["ส ว ั ส ด ี"]),
        ("e\u0301 🙂🙂 a_b <s>", ["e 🙂 🙂 a_b < s >"]),
        ("a\x00b\x07 \x85 \u2028c", ["a b c"]),
        (" \n\t\x00\n", []),
    ],
)
def test_texts_become_lines_of_plain_words(text, expected):
    assert lines(text) == expected


def test_a_perplexity_is_that_of_kenlm_over_all_lines(english):
    model = kenlm.Model(str(english))
    ours = open_perplexity_model(english, LineSplitterConfig()).compute
    one = "the value of an expression is an object"
    assert ours(one.upper()) == pytest.approx(model.perplexity(one), rel=1e-6)
    text = "A class.\n\nzyzzyva 12 is\n"
    log_probabilities = []
    for line in ("a class .", "zyzzyva 00 is"):
        log_probabilities += [score for score, _, _ in model.full_scores(line)]
    assert len(log_probabilities) == 8
    expected = 10 ** -np.mean(log_probabilities)
    assert ours(text) == pytest.approx(expected, rel=1e-6)


def label(stage, texts, languages=None):
    columns = {"text": pa.array(texts, pa.large_string())}
    if stage.language is not None:
        columns[stage.language] = pa.array(languages, pa.string())
    assert tuple(columns) == stage.input_columns
    labels = stage.make_batch_label_fn()(pa.RecordBatch.from_pydict(columns))
    assert labels.schema == stage.schema()
    return labels.to_pylist()


def test_a_stage_labels_by_language(english, tmp_path):
    german = write_arpa(tmp_path / "de.arpa", PARAGRAPHS[:200])
    stage = PerplexityStage(
        models={"en": english, "de": german}, cutoffs={"en": (9e3, 1e5)}
    )
    good = PARAGRAPHS[4]
    none = {"value": None, "bucket": None}
    texts = [good, good, good, good, "", "qzx jjk wvv"]
    labels = label(stage, texts, ["en", "de", "fr", None, "en", "en"])
    values = [
        open_perplexity_model(p, LineSplitterConfig()).compute(good)
        for p in (english, german)
    ]
    assert [row["value"] for row in labels[:2]] == values
    assert [row["bucket"] for row in labels[:2]] == ["head", None]
    assert labels[2:5] == [none] * 3
    assert labels[5]["bucket"] == "tail"


def test_a_missing_or_damaged_model_is_named(tmp_path):
    stage = PerplexityStage(models={"en": tmp_path / "en.arpa"})
    with pytest.raises(MaxlmError, match=r"cannot read .*en\.arpa.*train-perplexity"):
        stage.fingerprint()
    (tmp_path / "en.arpa").write_text("nothing")
    with pytest.raises(MaxlmError, match=r"cannot read this model.*train-perplexity"):
        label(stage, ["x"], ["en"])


def test_the_key_changes_with_the_models_content(english, tmp_path):
    path = tmp_path / "en.arpa"
    path.write_bytes(english.read_bytes())
    stage = PerplexityStage(models={"en": path})
    before = stage.fingerprint()
    with path.open("ab") as file:
        file.write(b"\n")
    assert stage.fingerprint() != before


SMALL = KneserNeyConfig(order=3, discount_fallback=(0.5, 1, 1.5))
TRAINING = PerplexityTrainingConfig(ngrams=SMALL, hold_out=10)
SAMPLE = PARAGRAPHS[-200:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "en"
    train_perplexity(PARAGRAPHS[:300], folder, TRAINING, reference=SAMPLE)
    return folder


def test_documents_that_set_the_cutoffs_are_not_trained_on(tmp_path):
    texts = [f"{p} unique{i}x" for i, p in enumerate(PARAGRAPHS[:300])]
    config = TRAINING.model_copy(update={"words": LineSplitterConfig(digits=False)})
    report = train_perplexity(texts, tmp_path / "en", config)
    theirs = kenlm.Model(str(tmp_path / "en" / "model.arpa"))
    # Each tenth document is held out.
    is_trained_on = [i % 10 != 9 for i in range(300)]
    assert [f"unique{i}x" in theirs for i in range(300)] == is_trained_on
    assert report.num_documents == 270
    assert report.metadata.reference_documents == 30
    model = open_perplexity_model(tmp_path / "en", LineSplitterConfig())
    scores = [model.compute(text) for text in texts[9::10]]
    assert model.cutoffs == pytest.approx(np.percentile(scores, [100 / 3, 200 / 3]))
    assert report.metadata.percentiles[50] == pytest.approx(np.median(scores))
    stage = PerplexityStage(models={"*": tmp_path / "en"}, language=None)
    texts_with_numbers = label(stage, texts)
    buckets = [row["bucket"] for row in texts_with_numbers[9::10]]
    assert [buckets.count(bucket) for bucket in ("head", "middle", "tail")] == [
        10,
        10,
        10,
    ]


def test_a_sample_sets_the_cutoffs_of_a_file_and_of_a_folder(
    english, trained, tmp_path
):
    config = PerplexityCalibrationConfig(
        percentiles=(30.0, 60.0),
        reference_documents=30,
        words=LineSplitterConfig(lower=False),
    )
    sample = [" \n", *SAMPLE]  # A document without words counts for nothing.
    metadata = calibrate_perplexity(english, iter(sample), tmp_path / "a", config)
    assert (tmp_path / "a" / "model.arpa").read_bytes() == english.read_bytes()
    model = open_perplexity_model(tmp_path / "a", LineSplitterConfig())
    compute = open_perplexity_model(english, LineSplitterConfig(lower=False)).compute
    scores = [compute(text) for text in SAMPLE[:29]]
    assert [model.compute(text) for text in SAMPLE[:29]] == scores
    assert metadata.reference_documents == 29
    assert model.cutoffs == pytest.approx(np.percentile(scores, [30, 60]))

    calibrate_perplexity(trained, SAMPLE[:30], tmp_path / "b", config)
    assert read_perplexity_metadata(tmp_path / "b").words == LineSplitterConfig()
    before = read_perplexity_metadata(tmp_path / "b")
    calibrate_perplexity(tmp_path / "b", SAMPLE[50:90], tmp_path / "b")
    after = read_perplexity_metadata(tmp_path / "b")
    assert after.model_sha256 == before.model_sha256
    assert after.cutoffs != before.cutoffs
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "cutoffs.json",
        "model.arpa",
    ]


def test_a_recipes_cutoffs_take_the_place_of_a_models(trained):
    text = PARAGRAPHS[4]
    plain = label(PerplexityStage(models={"en": trained}), [text], ["en"])
    value = plain[0]["value"]
    assert value == open_perplexity_model(trained, LineSplitterConfig()).compute(text)
    assert plain[0]["bucket"] is not None
    for cutoffs, bucket in [
        ((value, value), "head"),
        ((0, value), "middle"),
        ((0, 1), "tail"),
    ]:
        stage = PerplexityStage(models={"en": trained}, cutoffs={"en": cutoffs})
        assert label(stage, [text], ["en"]) == [{"value": value, "bucket": bucket}]


def test_a_model_stays_until_another_is_done(trained, tmp_path):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    with pytest.raises(MaxlmError, match="19 documents are too few to set cutoffs by"):
        train_perplexity(PARAGRAPHS[:199], trained, TRAINING)
    with pytest.raises(MaxlmError, match=r"0 documents are too few.*--reference"):
        calibrate_perplexity(trained, [], trained)
    (tmp_path / "bad.arpa").write_text("nothing")
    with pytest.raises(MaxlmError, match="cannot read this model"):
        calibrate_perplexity(tmp_path / "bad.arpa", SAMPLE, trained)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    with pytest.raises(MaxlmError, match="no words"):
        train_perplexity([" "] * 99, tmp_path / "new", TRAINING)
    assert not (tmp_path / "new").exists()


def test_a_damaged_folder_is_one_line(trained, tmp_path):
    stage = PerplexityStage(models={"en": tmp_path})
    message = r"cutoffs\.json: there is no .*maxlm corpus train-perplex"
    with pytest.raises(MaxlmError, match=message):
        stage.fingerprint()
    (tmp_path / "cutoffs.json").write_text("{}")
    message = r"cutoffs\.json: this describes no perplexity model: "
    with pytest.raises(MaxlmError, match=message):
        stage.fingerprint()
    for name in ("model.arpa", "cutoffs.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    stage.fingerprint()
    with (tmp_path / "model.arpa").open("ab") as file:
        file.write(b"x")
    message = r"written for another model; maxlm corpus calibrate-perp"
    with pytest.raises(MaxlmError, match=message):
        stage.fingerprint()
