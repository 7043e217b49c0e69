"""Perplexities of documents: KenLM's own figures, cutoffs and buckets, and the stage's labels."""

from pydoc_data.topics import topics

import kenlm
import numpy as np
import pyarrow as pa
import pytest

from maxlm.config import MaxlmError
from maxlm.corpus.kneser_ney import KneserNeyConfig
from maxlm.corpus.stages.perplexity import (
    PerplexityConfig,
    PerplexityStage,
    choose_bucket,
    open_model,
    read_perplexity_metadata,
    train_perplexity,
)
from maxlm.corpus.text import LineSplitterConfig, make_line_splitter

# The reference manual of the running Python: half a megabyte of English.
PARAGRAPHS = [p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 300]
SMALL = KneserNeyConfig(order=3, discount_fallback=(0.5, 1, 1.5))
CONFIG = PerplexityConfig(ngrams=SMALL, hold_out=5)


def lines(text, **options):
    return list(make_line_splitter(LineSplitterConfig(**options))(text))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, train_perplexity(PARAGRAPHS, folder, CONFIG)


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


def test_a_perplexity_is_that_of_kenlm_over_all_lines(trained):
    folder, _ = trained
    model, ours = kenlm.Model(str(folder / "model.arpa")), open_model(folder)
    one = "the value of an expression is an object"
    assert ours.perplexity(one.upper()) == pytest.approx(model.perplexity(one), rel=1e-6)
    text = "A class.\n\nzyzzyva 12 is\n"
    scores = [score for line in ("a class .", "zyzzyva 00 is") for score in model.full_scores(line)]
    assert len(scores) == 8
    expected = 10 ** -np.mean([probability for probability, _, _ in scores])
    assert ours.perplexity(text) == pytest.approx(expected, rel=1e-6)


def test_documents_that_set_the_cutoffs_are_not_trained_on(tmp_path):
    texts = [f"{p} unique{i}x" for i, p in enumerate(PARAGRAPHS[:300])]
    config = CONFIG.model_copy(update={"words": LineSplitterConfig(digits=False), "hold_out": 10})
    report = train_perplexity(texts, tmp_path, config)
    theirs = kenlm.Model(str(tmp_path / "model.arpa"))
    known = [f"unique{i}x" in theirs for i in range(300)]
    assert known == [i % 10 != 9 for i in range(300)]
    assert (report.documents, report.reference) == (270, 30)
    model = open_model(tmp_path)
    scores = [model.perplexity(text) for text in texts[9::10]]
    assert report.cutoffs == pytest.approx(np.percentile(scores, [100 / 3, 200 / 3]))
    assert report.percentiles[50] == pytest.approx(np.median(scores))
    buckets = [choose_bucket(score, report.cutoffs) for score in scores]
    assert [buckets.count(each) for each in ("head", "middle", "tail")] == [10, 10, 10]


def test_a_reference_sets_the_cutoffs_and_leaves_all_texts_to_training(tmp_path):
    config = CONFIG.model_copy(update={"percentiles": (30.0, 60.0), "reference_documents": 40})
    report = train_perplexity(PARAGRAPHS[:300], tmp_path, config, reference=iter(PARAGRAPHS[300:]))
    assert (report.documents, report.reference) == (300, 40)
    model = open_model(tmp_path)
    scores = [model.perplexity(text) for text in PARAGRAPHS[300:340]]
    assert report.cutoffs == pytest.approx(np.percentile(scores, [30, 60]))


def test_too_few_documents_are_an_error_and_no_model(tmp_path):
    with pytest.raises(MaxlmError, match="19 documents are too few") as error:
        train_perplexity(PARAGRAPHS[:99], tmp_path, CONFIG)
    assert "reference" in str(error.value)
    with pytest.raises(MaxlmError, match="no perplexity model"):
        read_perplexity_metadata(tmp_path)


def label(stage, texts, languages=None):
    columns = {"text": pa.array(texts, pa.large_string())}
    if stage.language is not None:
        columns[stage.language] = pa.array(languages, pa.string())
    assert tuple(columns) == stage.input_columns
    labels = stage.make_batch_label_fn()(pa.RecordBatch.from_pydict(columns))
    assert labels.schema == stage.schema()
    return labels.to_pylist()


def test_a_stage_labels_by_language(trained, tmp_path):
    train_perplexity(PARAGRAPHS[:200], tmp_path, CONFIG)
    stage = PerplexityStage(models={"en": trained[0], "de": tmp_path}, cutoffs={"de": (1.0, 1e9)})
    good, none = PARAGRAPHS[4], {"value": None, "bucket": None}
    texts = [good, good, good, good, "", "qzx jjk wvv"]
    labels = label(stage, texts, ["en", "de", "fr", None, "en", "en"])
    english = open_model(trained[0])
    assert labels[0]["value"] == english.perplexity(good)
    assert labels[0]["bucket"] == choose_bucket(labels[0]["value"], trained[1].cutoffs)
    assert labels[1]["value"] == open_model(tmp_path).perplexity(good) != labels[0]["value"]
    assert labels[1]["bucket"] == "middle"
    assert labels[2:5] == [none] * 3
    assert labels[5]["bucket"] == "tail"


def test_a_missing_or_damaged_model_names_the_command_that_trains_one(trained, tmp_path):
    stage = PerplexityStage(models={"en": tmp_path / "none"})
    for call in (stage.make_batch_label_fn, stage.fingerprint):
        with pytest.raises(MaxlmError, match="maxlm corpus train-perplexity"):
            call()
    (tmp_path / "cutoffs.json").write_text("{}")
    with pytest.raises(MaxlmError, match="train it again"):
        PerplexityStage(models={"en": tmp_path}).make_batch_label_fn()
    (tmp_path / "cutoffs.json").write_bytes((trained[0] / "cutoffs.json").read_bytes())
    (tmp_path / "model.arpa").write_text("nothing")
    with pytest.raises(MaxlmError, match="train it again"):
        label(PerplexityStage(models={"en": tmp_path}), ["x"], ["en"])


def test_the_key_refuses_a_model_of_other_cutoffs(trained, tmp_path):
    stage = PerplexityStage(models={"en": tmp_path})
    for name in ("model.arpa", "cutoffs.json"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    stage.fingerprint()
    with (tmp_path / "model.arpa").open("ab") as file:
        file.write(b"x")
    with pytest.raises(MaxlmError, match="not the one"):
        stage.fingerprint()
