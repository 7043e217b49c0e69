"""What tasks hear of a tokenizer: ids that no text has, and those with which words
begin."""

import json

import numpy as np
import pytest

from maxlm.data.tokenizer.load import import_tokenizer
from maxlm.run.prepare import make_vocabulary
from tests.data.tokenizer.foreign import write_checkpoint

# Special tokens but for the unknown character's, where ordinary text may have it;
# openings, ends.
SPECIAL = {
    "smollm2": ({"<|endoftext|>", "<|im_start|>", "<|im_end|>"}, [], "<|im_end|>"),
    "qwen": ({"<|endoftext|>", "<|im_end|>"}, [], "<|endoftext|>"),
    "roberta": ({"<s>", "</s>", "<mask>"}, ["<s>"], "</s>"),
    "llama2": ({"<unk>", "<s>", "</s>"}, ["<s>"], "</s>"),
    "t5": ({"<pad>", "</s>", "<extra_id_0>"}, [], "</s>"),
    "bert": ({"[PAD]", "[CLS]", "[SEP]", "[MASK]"}, ["[CLS]"], "[SEP]"),
}
# Pieces as the files have them: bytes as GPT-2's characters (Ġ is a space, Ċ a line's
# end, Ã© is é), ▁ for a space, ## for what goes on. Those with which a word begins, and
# those that go on.
PIECES = {
    "smollm2": (
        ["Ġthe", "ĠStraÃŁe", "ĊĠĠ", "):", "'s", "ãĢĤ", "<tool>", "    "],
        ["the", "Ã©", "The", "grÃ¶ÃŁer", "7", "fox hole"],
    ),
    "llama2": (
        ["▁été", "▁▁the", "\n\n\nc", "+▁1", "<0x20>"],
        ["the▁the", "été", "45", "<0x41>"],
    ),
    "t5": (["▁", "▁the", "\n", "'", "。", "<unk>"], ["the", "ße", "é", "猫", "5"]),
    "bert": (
        ["the", "großer", "猫", "。", "12345", "[UNK]"],
        ["##er", "##ß", "##34", "##て"],
    ),
}
# Parts of characters, though some of their bytes are written as signs (¼, ¶, ©).
BROKEN = {
    "smollm2": ["ãĢ", "ãģ", "ĤĤ", "¼ber", "¶ÃŁ", "Ã", "©"],
    "llama2": ["<0xC3>", "<0xA9>", "<0xE3>", "<0x80>"],
}


@pytest.fixture
def read(tmp_path):
    """A tokenizer by name, and its file's ids by piece."""

    def tokenizer(name: str):
        folder = write_checkpoint(tmp_path / name, name)
        data = json.loads((folder / "tokenizer.json").read_text())
        pieces = data["model"]["vocab"]
        if isinstance(pieces, list):
            pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
        added = {token["content"]: token["id"] for token in data["added_tokens"]}
        return import_tokenizer(folder), pieces | added

    return tokenizer


@pytest.mark.parametrize("name", SPECIAL)
def test_special_ids_are_those_of_no_text_and_all_past_the_tokenizers(name, read):
    tokenizer, ids = read(name)
    special, opening, end = SPECIAL[name]
    last = max(ids.values())
    vocabulary = make_vocabulary(tokenizer, last + 1 + 7)
    assert vocabulary.size == last + 8
    assert {piece for piece, i in ids.items() if vocabulary.is_special[i]} == special
    assert vocabulary.is_special.shape == (last + 8,)
    assert vocabulary.is_special[last + 1 :].all()
    assert vocabulary.is_special[
        sorted(set(range(last)) - set(ids.values()))
    ].all()  # qwen's has holes
    assert (vocabulary.bos_ids, vocabulary.eos) == (
        tuple(ids[piece] for piece in opening),
        ids[end],
    )


@pytest.mark.parametrize("name", PIECES)
def test_words_begin_where_no_letter_or_digit_goes_on(name, read):
    tokenizer, ids = read(name)
    begin, go_on = PIECES[name]
    starts_word = make_vocabulary(tokenizer, tokenizer.vocab_size + 3).starts_word
    assert [piece for piece in begin + go_on if starts_word[ids[piece]]] == begin
    assert not starts_word[[ids[piece] for piece in BROKEN.get(name, [])]].any()
    assert starts_word[tokenizer.vocab_size :].all()


@pytest.mark.parametrize("name", ["smollm2", "qwen", "roberta", "llama2", "gemma"])
def test_a_text_falls_into_its_words(name, read):
    """Of letters that are whole pieces, and of such as come as two, three and four
    bytes."""
    tokenizer, _ = read(name)
    text = "kiwi žluť étude ꙮꙮ x𐐷y"
    ids = np.array(tokenizer.encode(text))
    starts = make_vocabulary(tokenizer, tokenizer.vocab_size).starts_word[ids]
    words = np.split(ids, np.flatnonzero(starts[1:]) + 1)
    assert len(ids) > len(words) + 8
    word_texts = [
        tokenizer.decode_bytes(word.tolist(), continued=True).decode() for word in words
    ]
    assert [word.strip() for word in word_texts] == text.split()
