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


@given(st.lists(st.integers(0, 599)))
def test_any_ids_stream_as_they_decode(tokenizer, ids):
    stream = StreamDecoder(tokenizer)
    pushed = "".join([stream.push(i) for i in ids])
    assert pushed + stream.flush() == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer):
    ids = tokenizer.encode("🦊")
    assert len(ids) == 4
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "", "", "🦊"]
    assert stream.flush() == ""


def test_flush_shows_an_unfinished_character_and_starts_afresh(tokenizer):
    stream = StreamDecoder(tokenizer)
    for i in tokenizer.encode("🦊")[:2]:
        assert stream.push(i) == ""
    assert stream.flush() == "\ufffd"
    assert "".join(stream.push(i) for i in tokenizer.encode("fox")) == "fox"
