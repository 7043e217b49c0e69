"""Perplexities of documents: KenLM's own figures, cutoffs and buckets, and the stage's labels."""

import json
from pydoc_data.topics import topics

import kenlm
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.corpus.kneser_ney import KneserNeyConfig
from maxlm.corpus.perplexity import (
    PerplexityConfig,
    choose_bucket,
    open_model,
    read_cutoffs,
    train_perplexity,
)
from maxlm.corpus.stages.perplexity import PerplexityStage
from maxlm.corpus.words import WordsConfig, open_lines

# The reference manual of the running Python: half a megabyte of English.
PARAGRAPHS = [p for topic in topics.values() for p in topic.split("\n\n") if len(p) > 300]
SMALL = KneserNeyConfig(order=3, discount_fallback=(0.5, 1, 1.5))
CONFIG = PerplexityConfig(ngrams=SMALL, hold_out=5)


def lines(text, **options):
    return list(open_lines(WordsConfig(**options))(text))


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
        ("℡ 𝐀 İ", ["tel a i"]),
        ("我爱北京。ひらカタ\u3000x", ["我 爱 北 京 . ひ ら カ タ x"]),
        ("कि नमस्ते। مَرْحَبا، ٣", ["कि नमस्ते . مَرْحَبا , 0"]),
        ("สวัสดี", ["ส ว ั ส ด ี"]),
        ("e\u0301 🙂🙂 a_b <s>", ["e 🙂 🙂 a_b < s >"]),
        ("a\x00b\x07 \x85 \u2028c", ["a b c"]),
        ("", []),
        (" \n\t\x00\n", []),
    ],
)
def test_texts_become_lines_of_plain_words(text, expected):
    assert lines(text) == expected


@given(st.lists(st.text("aZ9`'\"-.~^|é´`“—。 ", max_size=8), max_size=4))
def test_a_lines_words_hang_on_no_other_line(texts):
    alone = [line for text in texts for line in lines(text)]
    assert lines("\n".join(texts)) == alone
    assert lines("\n".join([*texts, "ü"])) == [*alone, "u"]


def test_each_part_of_the_normalisation_can_be_left_out():
    assert lines("Éa 7", lower=False) == ["Ea 0"]
    assert lines("Éa 7", accents=False) == ["éa 0"]
    assert lines("Éa 7", digits=False) == ["ea 7"]


def test_tokens_of_a_tokenizer_can_be_the_words(tmp_path):
    from maxlm.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer

    texts = [p.encode() for p in PARAGRAPHS[:20]]
    train_tokenizer(TokenizerConfig(vocab_size=300), texts).save(tmp_path / "bpe")
    tokenizer = load_tokenizer(tmp_path / "bpe")
    ids = " ".join(map(str, tokenizer.encode("the cafe 00")))
    assert lines("The café 12\n\n", tokenizer=str(tmp_path / "bpe")) == [ids]
    config = CONFIG.model_copy(update={"words": WordsConfig(tokenizer=str(tmp_path / "bpe"))})
    train_perplexity(PARAGRAPHS[:200], tmp_path / "model", config)
    words = tokenizer.encode(PARAGRAPHS[0].lower())
    assert len(words) > 1
    assert all(str(word) in kenlm.Model(str(tmp_path / "model/model.arpa")) for word in words[:5])


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
    config = CONFIG.model_copy(update={"words": WordsConfig(digits=False), "hold_out": 10})
    report = train_perplexity(texts, tmp_path, config)
    known = [f"unique{i}x" in kenlm.Model(str(tmp_path / "model.arpa")) for i in range(300)]
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
        read_cutoffs(tmp_path)


def test_a_failed_training_takes_the_model_it_was_to_replace_out_of_use(tmp_path):
    train_perplexity(PARAGRAPHS[:200], tmp_path, CONFIG)
    read_cutoffs(tmp_path)
    with pytest.raises(MaxlmError):
        train_perplexity([], tmp_path, CONFIG)
    with pytest.raises(MaxlmError, match="no perplexity model"):
        read_cutoffs(tmp_path)


def label(stage, texts, languages=None):
    columns = {"text": pa.array(texts, pa.large_string())}
    if stage.language is not None:
        columns[stage.language] = pa.array(languages, pa.string())
    assert tuple(columns) == stage.reads
    labels = stage.open()(pa.RecordBatch.from_pydict(columns))
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


def test_one_model_can_be_for_all_other_languages(trained):
    stage = PerplexityStage(models={"*": trained[0]}, language=None)
    [one] = label(stage, [PARAGRAPHS[4]])
    stage = PerplexityStage(models={"*": trained[0]}, language="language.name")
    assert label(stage, [PARAGRAPHS[4]] * 2, ["fr", None]) == [one, one]


@pytest.mark.parametrize(
    "text", ["\x00", "🙂" * 1000, "a " * 500_000, "x" * 1_000_000, "عربي", "漢字"]
)
def test_odd_texts_get_a_number_or_null(text, trained):
    stage = PerplexityStage(models={"*": trained[0]}, language=None)
    [one] = label(stage, [text])
    assert (one["value"] is None) == (text == "\x00")
    assert one["value"] is None or 1 < one["value"] < 1e12


def test_a_missing_or_damaged_model_names_the_command_that_trains_one(trained, tmp_path):
    stage = PerplexityStage(models={"en": tmp_path / "none"})
    for call in (stage.open, stage.key):
        with pytest.raises(MaxlmError, match="maxlm corpus train-perplexity"):
            call()
    (tmp_path / "cutoffs.json").write_text("{}")
    with pytest.raises(MaxlmError, match="train it again"):
        PerplexityStage(models={"en": tmp_path}).open()
    (tmp_path / "cutoffs.json").write_bytes((trained[0] / "cutoffs.json").read_bytes())
    (tmp_path / "model.arpa").write_text("nothing")
    with pytest.raises(MaxlmError, match="train it again"):
        label(PerplexityStage(models={"en": tmp_path}), ["x"], ["en"])


def test_the_key_follows_the_model(tmp_path):
    train_perplexity(PARAGRAPHS[:200], tmp_path, CONFIG)
    stage = PerplexityStage(models={"en": tmp_path})
    first = stage.key()
    train_perplexity(PARAGRAPHS[:200], tmp_path, CONFIG)
    assert stage.key() == first
    train_perplexity(PARAGRAPHS[:201], tmp_path, CONFIG)
    assert stage.key() != first
    kept = json.loads((tmp_path / "cutoffs.json").read_text())
    assert kept["report"]["model"]["tokens"] > 1000


def test_the_key_refuses_a_model_of_other_cutoffs_and_follows_its_tokenizer(trained, tmp_path):
    from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer

    stage, kept = PerplexityStage(models={"en": tmp_path}), read_cutoffs(trained[0])
    (tmp_path / "model.arpa").write_bytes((trained[0] / "model.arpa").read_bytes())
    words = WordsConfig(tokenizer=str(tmp_path / "bpe"))
    whole = kept.model_copy(update={"words": words}).model_dump_json()
    (tmp_path / "cutoffs.json").write_text(whole)
    keys = []
    for size in (300, 310):
        texts = [p.encode() for p in PARAGRAPHS[:20]]
        train_tokenizer(TokenizerConfig(vocab_size=size), texts).save(tmp_path / "bpe")
        keys.append(stage.key())
    assert keys[0] != keys[1]
    with (tmp_path / "model.arpa").open("ab") as file:
        file.write(b"x")
    with pytest.raises(MaxlmError, match="not the one"):
        stage.key()


@pytest.mark.parametrize(
    "settings",
    [
        {"models": {}},
        {"models": {"en": "x"}, "cutoffs": {"en": (1, 2, 3)}},
        {"models": {"en": "x"}, "language": None},
        {"models": {"en": "x"}, "cutoffs": {"de": (1, 2)}},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValidationError):
        PerplexityStage(**settings)
