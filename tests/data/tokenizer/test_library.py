"""Our ids against the libraries' own, on the same model files."""

import pytest
from tokenizers import pre_tokenizers

import maxlm.data.tokenizer.codec as codec
from maxlm.data.tokenizer.codec import split_segments
from maxlm.data.tokenizer.huggingface import PATTERN

HARD = (
    "  two  spaces\n\n\n\tdef f(x):\r\n    return x   \n  \n \n12345 don't"
    " \u00a0 x\u2028y \x0b\x1c z"
    '\u2003wide   \r\r\n#!/bin/sh\n<|endoftext|>\n"""größer"""  猫が  e\u0301\u0301 ok\n'
)


@pytest.mark.heavy
@pytest.mark.parametrize("limit", [1, 50])
def test_cutting_long_texts_changes_no_id(tokenizer, texts, monkeypatch, limit):
    long = [HARD * 3, *texts, "".join(texts), HARD.encode() * 2]
    whole = tokenizer.encode_batch(long)
    monkeypatch.setattr(codec, "SEGMENT_CHARS", limit)
    pieces = split_segments(
        HARD * 3, reserved_chars="", cut_pattern=tokenizer.codec.cut_pattern
    )
    assert len(pieces) > 3
    assert "".join(map(str, pieces)) == HARD * 3
    cut = tokenizer.encode_batch(long)
    if tokenizer.kind == "sentencepiece_unigram":
        # Segmentations of equal likelihood are told apart by rounding: compare what
        # they score.
        score = tokenizer.codec._model.get_score
        for one, other in zip(cut, whole, strict=True):
            assert sum(map(score, one)) == pytest.approx(
                sum(map(score, other)), rel=1e-6
            )
    else:
        assert cut == whole


def test_batches_larger_than_one_library_call(tokenizer, monkeypatch):
    texts = [HARD, "", b"\xff" + HARD.encode() + b"\xfe", "a", HARD * 2]
    monkeypatch.setattr(codec, "SEGMENT_CHARS", 20)
    whole = tokenizer.encode_batch(texts)
    monkeypatch.setattr(codec, "BATCH_CHARS", 30)
    assert tokenizer.encode_batch(texts) == whole


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't (größer)", ["don", "'t", " (", "größer", ")"]),
        ("1234567", ["123", "456", "7"]),
        ("x = y1;\n", ["x", " =", " y", "1", ";\n"]),
        ("a  \r\n \nb", ["a", "  \r\n", " \n", "b"]),
        ("a\n\n    b ", ["a", "\n\n", "   ", " b", " "]),
        ("हिन्दी ...!?\n\nA", ["हिन्दी", " ...!?\n\n", "A"]),
    ],
)
def test_pre_tokeniser(text, words):
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    assert [word for word, _ in split.pre_tokenize_str(text)] == words
