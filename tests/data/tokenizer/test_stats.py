"""Counts of a tokenizer on texts."""

import dataclasses

import pytest

import maxlm.data.tokenizer.stats as stats
from maxlm.config import MaxlmError
from maxlm.data.tokenizer import measure_tokenizer


def test_counts(tokenizer, texts, monkeypatch):
    monkeypatch.setattr(stats, "_BATCH_BYTES", 100)
    data = [text.encode() for text in texts] + [b"\xff"]
    found = measure_tokenizer(tokenizer, iter(data))
    ids = [i for text in data for i in tokenizer.encode(text)]
    assert found.documents == len(data)
    assert found.bytes == sum(map(len, data))
    assert found.tokens == len(ids)
    assert found.used_ids == len(set(ids))
    assert found.bytes_per_token == pytest.approx(len(b"".join(data)) / len(ids))
    assert found.vocabulary_use == len(set(ids)) / 600
    known = dataclasses.replace(found, seconds=0.5, bytes=3_000_000)
    assert known.megabytes_per_second == 6.0


@pytest.mark.parametrize("empty", [[], [b""]])
def test_no_text(tokenizer, empty):
    with pytest.raises(MaxlmError) as error:
        measure_tokenizer(tokenizer, empty)
    assert str(error.value) == "no text to measure; give files that are not empty"
