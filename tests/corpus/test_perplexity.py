"""Perplexities of documents: KenLM's own figures, cutoffs and buckets, and the stage's labels."""

from collections import Counter
from itertools import pairwise
from math import log10
from pydoc_data.topics import topics

import kenlm
import numpy as np
import pyarrow as pa
import pytest

from maxlm.config import MaxlmError
from maxlm.corpus.stages.perplexity import (
    PerplexityConfig,
    PerplexityStage,
    calibrate_perplexity,
    choose_bucket,
    open_model,
)
from maxlm.corpus.text import LineSplitterConfig, make_line_splitter

# The reference manual of the running Python: half a megabyte of English.
PARAGRAPHS = [p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 300]


def lines(text, **options):
    return list(make_line_splitter(LineSplitterConfig(**options))(text))


def write_arpa(path, texts):
    """A bigram model with absolute discounting of 0.4, and backoffs of 0.4."""
    sentences = [["<s>", *line.split(), "</s>"] for text in texts for line in lines(text)]
    words = Counter(word for sentence in sentences for word in sentence)
    pairs = Counter(pair for sentence in sentences for pair in pairwise(sentence))
    rows = ["\\data\\", f"ngram 1={len(words) + 1}", f"ngram 2={len(pairs)}", "", "\\1-grams:"]
    rows.append("-7\t<unk>\t0")
    rows += [f"{log10(n / words.total()):.6f}\t{word}\t-0.4" for word, n in words.items()]
    rows += ["", "\\2-grams:"]
    rows += [f"{log10((n - 0.4) / words[a]):.6f}\t{a} {b}" for (a, b), n in pairs.items()]
    path.write_text("\n".join([*rows, "", "\\end\\", ""]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    arpa = write_arpa(folder / "en.arpa", PARAGRAPHS[:-200])
    return folder, calibrate_perplexity(arpa, PARAGRAPHS[-200:], folder)


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


def test_a_perplexity_is_that_of_kenlm_over_all_lines(calibrated):
    folder, _ = calibrated
    model, ours = kenlm.Model(str(folder / "model.kenlm")), open_model(folder)
    one = "the value of an expression is an object"
    assert ours.perplexity(one.upper()) == pytest.approx(model.perplexity(one), rel=1e-6)
    text = "A class.\n\nzyzzyva 12 is\n"
    scores = [score for line in ("a class .", "zyzzyva 00 is") for score in model.full_scores(line)]
    assert len(scores) == 8
    expected = 10 ** -np.mean([probability for probability, _, _ in scores])
    assert ours.perplexity(text) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("percentiles", [(100 / 3, 200 / 3), (30.0, 60.0)])
def test_a_reference_sets_the_cutoffs(calibrated, tmp_path, percentiles):
    config = PerplexityConfig(percentiles=percentiles, reference_documents=30)
    model = calibrated[0] / "model.kenlm"
    report = calibrate_perplexity(model, iter([" \n", *PARAGRAPHS[-200:]]), tmp_path, config)
    assert (tmp_path / "model.kenlm").read_bytes() == model.read_bytes()
    opened = open_model(tmp_path)
    scores = [opened.perplexity(text) for text in PARAGRAPHS[-200:-171]]
    assert report.documents == 29
    assert report.cutoffs == opened.cutoffs == pytest.approx(np.percentile(scores, percentiles))
    assert report.percentiles[50] == pytest.approx(np.median(scores))


def test_the_words_settings_are_kept_with_the_model(calibrated, tmp_path):
    config = PerplexityConfig(words=LineSplitterConfig(lower=False))
    calibrate_perplexity(calibrated[0] / "en.arpa", PARAGRAPHS[:30], tmp_path, config)
    text = "The Value Of An Expression"
    assert open_model(tmp_path).perplexity(text) > open_model(calibrated[0]).perplexity(text)


def test_a_reference_or_model_that_does_not_do_writes_nothing(calibrated, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(MaxlmError, match="19 documents are too few"):
        calibrate_perplexity(calibrated[0] / "en.arpa", PARAGRAPHS[:19], out)
    (tmp_path / "bad.arpa").write_text("nothing")
    for name in ("bad.arpa", "none.arpa"):
        with pytest.raises(MaxlmError, match="lmplz"):
            calibrate_perplexity(tmp_path / name, PARAGRAPHS[:30], out)
    assert not out.exists()


def label(stage, texts, languages=None):
    columns = {"text": pa.array(texts, pa.large_string())}
    if stage.language is not None:
        columns[stage.language] = pa.array(languages, pa.string())
    assert tuple(columns) == stage.input_columns
    labels = stage.make_batch_label_fn()(pa.RecordBatch.from_pydict(columns))
    assert labels.schema == stage.schema()
    return labels.to_pylist()


def test_a_stage_labels_by_language(calibrated, tmp_path):
    arpa = write_arpa(tmp_path / "de.arpa", PARAGRAPHS[:200])
    calibrate_perplexity(arpa, PARAGRAPHS[:30], tmp_path)
    stage = PerplexityStage(
        models={"en": calibrated[0], "de": tmp_path}, cutoffs={"de": (1.0, 1e9)}
    )
    good, none = PARAGRAPHS[4], {"value": None, "bucket": None}
    texts = [good, good, good, good, "", "qzx jjk wvv"]
    labels = label(stage, texts, ["en", "de", "fr", None, "en", "en"])
    english = open_model(calibrated[0])
    assert labels[0]["value"] == english.perplexity(good)
    assert labels[0]["bucket"] == choose_bucket(labels[0]["value"], calibrated[1].cutoffs)
    assert labels[1]["value"] == open_model(tmp_path).perplexity(good) != labels[0]["value"]
    assert labels[1]["bucket"] == "middle"
    assert labels[2:5] == [none] * 3
    assert labels[5]["bucket"] == "tail"


def test_a_missing_or_damaged_model_names_the_command_that_writes_one(calibrated, tmp_path):
    stage = PerplexityStage(models={"en": tmp_path / "none"})
    for call in (stage.make_batch_label_fn, stage.fingerprint):
        with pytest.raises(MaxlmError, match="maxlm corpus calibrate-perplexity"):
            call()
    (tmp_path / "cutoffs.json").write_text("{}")
    with pytest.raises(MaxlmError, match="calibrate-perplexity"):
        PerplexityStage(models={"en": tmp_path}).make_batch_label_fn()
    (tmp_path / "cutoffs.json").write_bytes((calibrated[0] / "cutoffs.json").read_bytes())
    (tmp_path / "model.kenlm").write_text("nothing")
    with pytest.raises(MaxlmError, match="calibrate-perplexity"):
        label(PerplexityStage(models={"en": tmp_path}), ["x"], ["en"])


def test_the_key_refuses_a_model_of_other_cutoffs(calibrated, tmp_path):
    stage = PerplexityStage(models={"en": tmp_path})
    for name in ("model.kenlm", "cutoffs.json"):
        (tmp_path / name).write_bytes((calibrated[0] / name).read_bytes())
    stage.fingerprint()
    with (tmp_path / "model.kenlm").open("ab") as file:
        file.write(b"x")
    with pytest.raises(MaxlmError, match="not the one"):
        stage.fingerprint()
