"""Streamed text is the decoded text, in whole characters."""

from hypothesis import given
from hypothesis import strategies as st

from maxlm.data.tokenizer import StreamDecoder


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
