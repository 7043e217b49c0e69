"""Counts of tokens, words and unknown tokens."""

from maxlm.data.tokenizer.stats import measure_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer

TEXTS = [b"the quick brown fox \xe2\x98\x83"] * 300 + [
    "größer über Straße, où été ☃ ☃".encode()
]


def test_counts_are_those_of_the_ids(make_config, texts):
    tokenizer = train_tokenizer(make_config("bpe"), texts)
    ids = tokenizer.encode_batch(TEXTS)
    measures = measure_tokenizer(tokenizer, iter(TEXTS))
    assert (measures["documents"], measures["bytes"]) == (301, sum(map(len, TEXTS)))
    assert measures["tokens"] == sum(map(len, ids))
    assert measures["fertility"] == measures["tokens"] / sum(
        len(text.split()) for text in TEXTS
    )
    assert measures["unknown"] == 0
    assert measures["used_ids"] == len(set().union(*ids))
