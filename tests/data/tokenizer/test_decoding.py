"""Decoders token by token against the library's over whole sequences."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.huggingface import TokenDecoder

TOKENS = [
    "the", "▁the", "▁", "▁▁a", "a▁b", "##s", "##", ".", "'", "n't", "'s", "!", "Ġthe", "Ã©", "é",
    "<s>", "[SEP]", "do not", "<0x41>", "<0x20>", "Ċ", "猫",
]  # fmt: skip

DECODERS = {
    "byte level": decoders.ByteLevel(),
    "metaspace": decoders.Metaspace(prepend_scheme="always"),
    "metaspace, first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "word pieces": decoders.WordPiece("##", True),
    "word pieces, untidied": decoders.WordPiece("##", False),
    "byte fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "llama": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
    "replaced after fusing": decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 0, 0)]
    ),
}


def state(decoder) -> dict:
    return json.loads(decoder.__getstate__())


@pytest.mark.parametrize("name", DECODERS)
@given(st.lists(st.sampled_from(TOKENS), max_size=6))
def test_tokens_joined_are_the_librarys_text(name, tokens):
    decoder = TokenDecoder(DECODERS[name], state(DECODERS[name]))
    spelled = [decoder.decode(token, first=n == 0) for n, token in enumerate(tokens)]
    assert b"".join(spelled).decode("utf-8", "replace") == DECODERS[name].decode(tokens)


def test_without_a_decoder_tokens_stand_apart():
    decoder = TokenDecoder(None, None)
    assert decoder.decode("a", first=True) + decoder.decode("b", first=False) == b"a b"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Strip(" ", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", " ")]),
    ],
)
def test_decoders_that_look_at_the_whole_text_are_refused(decoder):
    with pytest.raises(
        MaxlmError, match="cannot decode token by token with the decoder"
    ):
        TokenDecoder(decoder, state(decoder))
