"""Counts of tokens, words and unknown tokens."""

from maxlm.data.tokenizer import measure_tokenizer, train_tokenizer

TEXTS = [b"the quick brown fox \xe2\x98\x83"] * 300 + [
    "größer über Straße, où été ☃ ☃".encode()
]


def test_counts_are_those_of_the_ids(make_config, texts):
    tokenizer = train_tokenizer(make_config("bpe"), texts)
    ids = tokenizer.encode_batch(TEXTS)
    found = measure_tokenizer(tokenizer, iter(TEXTS))
    assert (found["documents"], found["bytes"]) == (301, sum(map(len, TEXTS)))
    assert found["tokens"] == sum(map(len, ids))
    assert found["fertility"] == found["tokens"] / sum(
        len(text.split()) for text in TEXTS
    )
    assert found["unknown"] == 0
    assert found["used_ids"] == len(set().union(*ids))
