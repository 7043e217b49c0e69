"""Counts of tokens, words and unknown tokens."""

import pytest

from maxlm.data.tokenizer import measure_tokenizer, train_tokenizer
from tests.data.tokenizer.test_wordpiece import config as wordpiece

TEXTS = [b"the quick brown fox \xe2\x98\x83"] * 300 + ["größer über Straße, où été ☃ ☃".encode()]


@pytest.mark.parametrize(("kind", "unknown"), [("bpe", 0), ("wordpiece", 302)])
def test_counts_are_those_of_the_ids(make_config, texts, kind, unknown):
    config = wordpiece() if kind == "wordpiece" else make_config(kind)
    tokenizer = train_tokenizer(config, texts)
    ids = tokenizer.encode_batch(TEXTS)
    found = measure_tokenizer(tokenizer, iter(TEXTS))
    assert (found.documents, found.bytes) == (301, sum(map(len, TEXTS)))
    assert found.tokens == sum(map(len, ids))
    assert found.fertility == found.tokens / sum(len(text.split()) for text in TEXTS)
    assert found.unknown == unknown
    assert found.used_ids == len(set().union(*ids))
