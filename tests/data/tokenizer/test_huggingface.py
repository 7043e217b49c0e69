"""Imported tokenizers against the `tokenizers` library on the same file."""

import json
import random

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models

from maxlm.data.tokenizer.codec import StreamDecoder
from maxlm.data.tokenizer.huggingface import HuggingFaceCodec
from maxlm.data.tokenizer.load import import_tokenizer
from tests.data.tokenizer.foreign import MAKERS, TEXTS, write_checkpoint

TRICKY = [
    " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", "\0", "▁", "▁▁", "\ufffd", "\u2028",
    "\u00a0", "\u3000", "e\u0301", "é", "👩‍👩‍👧", "\U0010ffff", "Ġ", "ﬁ", "12345", "don't", "the",
    " the", "The fox", "猫", "<tool>", "fox hole", "<0x41>", "##s", " .", ",", "return x",
]  # fmt: skip
LITERALS = [
    "<|endoftext|>", "<|im_start|>", "<s>", "</s>", "<unk>", "<mask>", " <mask>", "<pad>",
    "<extra_id_0>", "[CLS]", "[SEP]", "[UNK]", "＜／s＞",
]  # fmt: skip
STRAY = [b"\xff", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f\x91"]

texts = st.lists(st.sampled_from(TRICKY) | st.text(max_size=3)).map("".join)
marked = st.lists(st.sampled_from(TRICKY + LITERALS) | st.text(max_size=3)).map("".join)
raw = st.lists(
    st.sampled_from([text.encode() for text in TRICKY + LITERALS] + STRAY)
    | st.binary(max_size=2)
).map(b"".join)


@pytest.fixture(scope="module", params=MAKERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(name, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(name), name)


@pytest.fixture(scope="module")
def library(checkpoint):
    return Library.from_file(str(checkpoint / "tokenizer.json"))


@pytest.fixture(scope="module")
def ours(checkpoint):
    return import_tokenizer(checkpoint)


def library_ids(library: Library, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


@pytest.mark.heavy
@given(texts)
@example("")
@example("  leading and trailing  ")
@example("".join(TEXTS))
def test_ids_are_the_librarys(ours, library, text):
    assume(not any(literal in text for literal in ours.special.ids))
    assert ours.encode(text) == library_ids(library, text)
    assert ours.encode(text.encode()) == library_ids(library, text)


@given(marked)
@example("a<mask> </s>b <|endoftext|><s>[CLS]<unk>")
def test_allow_special_gives_the_librarys_ids(ours, library, text):
    assert ours.encode(text, allow_special=True) == library_ids(library, text)


@given(marked | raw)
@example("<|im_start|> [CLS] </s> <unk> <extra_id_0><pad> ＜／s＞")
@example(b"\xff<|endoftext|>\xff</s>")
def test_text_never_gives_special_ids(ours, text):
    ids = ours.encode(text)
    assert not set(ids) & set(ours.special_tokens.values())
    assert all(type(i) is int and 0 <= i < ours.vocab_size for i in ids)


@given(marked, st.booleans())
@example("▁", False)
@example("  two spaces first", False)
@example("</s> x", True)
@example("the <mask>", True)
def test_text_of_ids_is_the_librarys(ours, library, text, special):
    ids = ours.encode(text, allow_special=special)
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


@given(st.lists(st.integers(0, 10_000)))
@example([])
def test_text_of_any_ids_is_the_librarys_and_streams(ours, library, numbers):
    ids = [number % ours.vocab_size for number in numbers]
    stream = StreamDecoder(ours)
    for _ in range(2):  # A flush makes it ready for another text.
        pushed = "".join([stream.push(i) for i in ids])
        assert pushed + stream.flush() == ours.decode(ids)
    # A run of byte tokens that is not all UTF-8 is all U+FFFD in the library; ours
    # shows its whole characters.
    fallback = {i for i in ids if (library.id_to_token(i) or "").startswith("<0x")}
    ids = [i for i in ids if i not in fallback]
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


@given(marked, st.integers(0, 20))
def test_streaming_on_from_other_ids(ours, text, cut):
    ids = ours.encode(text, allow_special=True)
    begun = next(
        (n for n, i in enumerate(ids, 1) if ours.codec.token_bytes[i]), len(ids)
    )
    cut = max(begun, min(cut, len(ids)))
    stream = StreamDecoder(ours, continued=True)
    rest = "".join([stream.push(i) for i in ids[cut:]]) + stream.flush()
    if ids:
        assert ours.decode_bytes(ids[:cut]) + ours.decode_bytes(
            ids[cut:], continued=True
        ) == (ours.decode_bytes(ids))
        assert (
            ours.decode_bytes(ids[cut:], continued=True).decode("utf-8", "replace")
            == rest
        )


@given(raw)
@example(b"\xff<|endoftext|>\xff")
@example("\ud800".encode("utf-8", "surrogatepass") + b" ok")
def test_any_bytes_come_back_from_a_lossless_one(name, ours, data):
    assert ours.lossless == (name == "smollm2")
    if ours.lossless:
        assert ours.decode_bytes(ours.encode(data)) == data


@given(texts)
@example("  two spaces first, two last  ")
@example(" ")
@example("<0x41>")
def test_valid_text_comes_back_from_byte_fallback(name, ours, text):
    if name in ("llama2", "gemma"):
        assume("▁" not in text)
        assert ours.decode(ours.encode(text)) == text


@given(raw)
def test_stray_bytes_are_shown_elsewhere(ours, data):
    if not ours.lossless:
        assert ours.encode(data) == ours.encode(data.decode("utf-8", "replace"))
    assert ours.encode("a\ud83d") == ours.encode(
        "a\ud83d".encode("utf-8", "surrogatepass")
    )


def test_truncation_padding_and_dropout_of_the_file_are_left_aside(tmp_path):
    folder = write_checkpoint(tmp_path, "llama2")
    library = Library.from_file(str(folder / "tokenizer.json"))
    text = "the quick brown fox " * 30
    whole = library_ids(library, text)
    library.enable_truncation(5)
    library.enable_padding(length=8)
    data = json.loads(library.to_str())
    data["model"]["dropout"] = 0.9
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert import_tokenizer(folder).encode(text) == whole


def test_special_tokens_that_are_ordinary_text_are_not_called_special(tmp_path):
    folder = write_checkpoint(tmp_path, "smollm2")
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "<|endoftext|>", "pad_token": "!", "bos_token": "fox"}'
    )
    library = Library.from_file(str(folder / "tokenizer.json"))
    ours = import_tokenizer(folder)
    assert ours.pad_id == library.token_to_id("!")
    assert "!" not in ours.special_tokens
    assert ours.encode("a!b") == library_ids(library, "a!b")


@pytest.mark.parametrize("name", ["llama2", "unigram"])
def test_byte_tokens_marked_special_keep_the_librarys_ids(name):
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if name == "unigram":
        pieces = [
            (piece, -1.0)
            for piece in ["<unk>", "</s>", *names, *"▁abcdefx", "ab", "xe"]
        ]
        library = Library(models.Unigram(pieces, 0, byte_fallback=True))
        library.add_special_tokens(["</s>"])
    else:
        library = MAKERS[name]()
    library.add_special_tokens(names[:100])
    added = library.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    ours = HuggingFaceCodec(library.to_str().encode(), special)
    rng = random.Random(7)
    alphabet = [
        *TRICKY,
        *map(chr, range(32)),
        "\x7f",
        "नमस्ते",
        "سلام",
        "Ω≈ç",
        "한국어",
        "🇫🇷",
    ]
    alphabet.append("👩🏽\u200d🚀")
    strings = ["".join(rng.choices(alphabet, k=rng.randrange(12))) for _ in range(100)]
    strings += ["<0x41>", "a<0x0A>\n<0xE7>猫 <0x", "x</s><0xFF></s>"]
    assert ours.encode_segments_with_special(strings) == [
        library_ids(library, text) for text in strings
    ]
    library.encode_special_tokens = True  # Literals are ordinary text.
    bytes_alone = [text for text in strings if "</s>" not in text]
    ids = [library_ids(library, text) for text in bytes_alone]
    assert ours.encode_segments(bytes_alone) == ids
    assert (
        sum(not ours.ordinary_special_ids.isdisjoint(text_ids) for text_ids in ids) > 60
    )
    assert library.token_to_id("</s>") not in ours.encode_segments(["x</s>"])[0]


def test_a_word_that_has_a_role_is_spelled_otherwise_in_text(tmp_path):
    folder = write_checkpoint(tmp_path, "smollm2")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "the"}')
    ours = import_tokenizer(folder)
    assert ours.special_tokens["the"] == ours.eos_id
    ids = ours.encode("the fox the,the")
    assert ours.eos_id not in ids
    assert ours.decode(ids) == "the fox the,the"
    assert ours.encode("the", allow_special=True) == [ours.eos_id]
