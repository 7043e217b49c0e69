"""Special ids come from our own hand only, never from text."""

import pytest

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer


def test_special_tokens_have_distinct_ids_in_order(tokenizer):
    special = tokenizer.special_tokens
    assert list(special) == ["<|endoftext|>", "<|pad|>", "<|user|>", "the", "[x]"]
    assert list(special.values()) == list(
        range(tokenizer.bos_id, tokenizer.bos_id + len(special))
    )
    assert tokenizer.pad_id == special["<|pad|>"]
    for literal, i in special.items():
        assert tokenizer.decode([i]) == literal


def test_allow_special_gives_ids_for_literals_and_leaves_the_rest_alone(tokenizer):
    special = tokenizer.special_tokens
    text = "<|user|>quick\u2581 dog<|endoftext|><|pad|>"
    user, *others = (special[name] for name in ("<|user|>", "<|endoftext|>", "<|pad|>"))
    expected = [user, *tokenizer.encode("quick\u2581 dog"), *others]
    assert tokenizer.encode(text, allow_special=True) == expected


def test_allow_special_takes_bytes_and_lone_surrogates(tokenizer):
    user = tokenizer.special_tokens["<|user|>"]
    ids = tokenizer.encode(b"\xff<|user|>\xe7\x8c", allow_special=True)
    assert user in ids
    assert tokenizer.decode_bytes(ids) == b"\xff<|user|>\xe7\x8c"
    ids = tokenizer.encode("\ud800<|user|>", allow_special=True)
    assert tokenizer.decode_bytes(ids) == b"\xed\xa0\x80<|user|>"


def test_the_longest_special_token_wins(texts):
    config = TokenizerConfig(vocab_size=300, extra_special_tokens=("<a", "<a>", "<a>b"))
    tokenizer = train_tokenizer(config, texts)
    special = tokenizer.special_tokens
    expected = [special[literal] for literal in ("<a>b", "<a>", "<a")]
    assert tokenizer.encode("<a>b<a><a", allow_special=True) == expected


@pytest.mark.parametrize("literal", ["a", "a b", "é!", "<0x0A>", "x" * 65])
def test_literals_that_could_be_confused_are_refused(literal):
    with pytest.raises(
        MaxlmError, match="cannot be a special token; use 2 to 64 printable"
    ):
        TokenizerConfig(extra_special_tokens=("<|ok|>", literal))
