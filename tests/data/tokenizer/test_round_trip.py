"""Every text of any bytes comes back, whichever library encodes it."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import StreamDecoder

# Pieces in which one library or the other sees something special.
TRICKY = [
    " ", "  ", "\t", "\n", "\r\n", "\r", "\0", "\u2581", "\u2585", "\ufffd", "\ufeff", "\u2028",
    "\x1c", "\u00a0", "\u3000", "<unk>", "<0x41>", "<|endoftext|>", "<|user|>", "the", "[x]",
    " \u2047 ", "e\u0301", "é", "👩‍👩‍👧", "\U0010ffff", "\u0378", "Ġ", "Ċ", "▁the",
    "12345", "don't",
]  # fmt: skip
STRAY = [
    b"\xff",
    b"\x80",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x91",
    b"\xc0\x80",
    b"\xe2\x96",
]

unicode_text = st.one_of(
    st.text(),
    st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=3))).map("".join),
)
any_bytes = st.one_of(
    st.binary(),
    st.lists(
        st.sampled_from([t.encode() for t in TRICKY] + STRAY) | st.binary(max_size=2)
    ).map(b"".join),
)


@given(unicode_text)
@example("")
@example("  leading and trailing  ")
@example("\u2581\u2581 a \u2581b\u2581")
@example("tabs\t\tand\r\nline\rends\n\n")
@example("x<|endoftext|>y<unk><0x00>")
@example(
    "the the<|user|>[x]"
)  # "the" is a special token here, and common in the training text.
def test_any_unicode_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)


@given(any_bytes)
@example(b"\xff<|endoftext|>\xff")
@example("\ud800".encode("utf-8", "surrogatepass") + b" ok")
def test_any_bytes_come_back(tokenizer, data):
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert not set(ids) & set(tokenizer.special_tokens.values())


@given(st.lists(st.one_of(unicode_text, any_bytes), max_size=6))
def test_a_batch_gives_what_each_text_gives(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("unit", [" ", "a", "\r\n", "7", "猫", "\u2581", "ab \n"])
def test_very_long_runs_come_back(tokenizer, unit):
    text = unit * 40_001
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("wrong", [-1, 600])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, wrong):
    with pytest.raises(
        MaxlmError, match=rf"token id {wrong} is outside \[0, 600\); decode with"
    ):
        tokenizer.decode([0, wrong])


@given(st.one_of(st.text(), st.binary().map(lambda b: b + "👩‍👧".encode())))
def test_pushed_text_joined_is_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = StreamDecoder(tokenizer)
    pushed = [stream.push(i) for i in ids]
    assert "".join(pushed) + stream.flush() == tokenizer.decode(ids)


def test_flush_shows_an_unfinished_character_and_starts_afresh(tokenizer):
    stream = StreamDecoder(tokenizer)
    for i in tokenizer.encode("🦊")[:2]:
        assert stream.push(i) == ""
    assert stream.flush() == "\ufffd"
    assert "".join(stream.push(i) for i in tokenizer.encode("fox")) == "fox"
