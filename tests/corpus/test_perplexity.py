"""Perplexities of documents: KenLM's own figures, buckets, and the stage's labels."""

from collections import Counter
from itertools import pairwise
from math import log10
from pydoc_data.topics import topics

import kenlm
import numpy as np
import pyarrow as pa
import pytest

from maxlm.config import MaxlmError
from maxlm.corpus.stages.perplexity import PerplexityStage, load_perplexity_model
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
    ours = load_perplexity_model(english, LineSplitterConfig())
    one = "the value of an expression is an object"
    assert ours(one.upper()) == pytest.approx(model.perplexity(one), rel=1e-6)
    text = "A class.\n\nzyzzyva 12 is\n"
    scores = [score for line in ("a class .", "zyzzyva 00 is") for score in model.full_scores(line)]
    assert len(scores) == 8
    expected = 10 ** -np.mean([probability for probability, _, _ in scores])
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
    stage = PerplexityStage(models={"en": english, "de": german}, cutoffs={"en": (9e3, 1e5)})
    good, none = PARAGRAPHS[4], {"value": None, "bucket": None}
    texts = [good, good, good, good, "", "qzx jjk wvv"]
    labels = label(stage, texts, ["en", "de", "fr", None, "en", "en"])
    values = [load_perplexity_model(p, LineSplitterConfig())(good) for p in (english, german)]
    assert [each["value"] for each in labels[:2]] == values
    assert [each["bucket"] for each in labels[:2]] == ["head", None]
    assert labels[2:5] == [none] * 3
    assert labels[5]["bucket"] == "tail"


def test_a_missing_or_damaged_model_is_named(tmp_path):
    stage = PerplexityStage(models={"en": tmp_path / "en.arpa"})
    with pytest.raises(MaxlmError, match=r"cannot read .*en\.arpa.*lmplz"):
        stage.fingerprint()
    (tmp_path / "en.arpa").write_text("nothing")
    with pytest.raises(MaxlmError, match=r"cannot read this model.*lmplz"):
        label(stage, ["x"], ["en"])


def test_the_key_changes_with_the_models_content(english, tmp_path):
    path = tmp_path / "en.arpa"
    path.write_bytes(english.read_bytes())
    stage = PerplexityStage(models={"en": path})
    before = stage.fingerprint()
    with path.open("ab") as file:
        file.write(b"\n")
    assert stage.fingerprint() != before
