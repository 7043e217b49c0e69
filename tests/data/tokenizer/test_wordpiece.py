"""WordPiece: what it learns, in every run the same, and its ids in the library."""

from collections import Counter
from itertools import pairwise

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import normalizers, pre_tokenizers

import maxlm.data.tokenizer.wordpiece as wordpiece
from maxlm.config import MaxlmError
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer

BERT = {
    "bos": "[CLS]",
    "eos": "[SEP]",
    "pad": "[PAD]",
    "extra_special_tokens": ("[MASK]",),
}


def config(**changes) -> TokenizerConfig:
    return TokenizerConfig(
        **{"kind": "wordpiece", "vocab_size": 600, **BERT, **changes}
    )


@pytest.fixture(scope="module")
def trained(texts):
    return train_tokenizer(config(), texts)


def pieces_by_hand(texts: list[str], count: int) -> list[str]:
    """The commonest pair merges; of equal ones that of the lower ids. Slowly."""
    words: Counter[tuple[str, ...]] = Counter()
    clean = normalizers.BertNormalizer(lowercase=False).normalize_str
    for text in texts:
        for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(clean(text)):
            if len(word) <= 100:
                words[(word[0], *(f"##{char}" for char in word[1:]))] += 1
    letters = {letter for word in words for letter in word}
    pieces = sorted(letters, key=lambda letter: (not letter[1:], letter))
    while len(pieces) < count:
        ids = {piece: i for i, piece in enumerate(pieces)}
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        left, right = min(
            pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]])
        )
        pieces.append(left + right[2:])
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            parts: list[str] = []
            for piece in word:
                if (
                    parts
                    and (parts[-1], piece) == (left, right)
                    and pieces[-1] != parts[-1]
                ):
                    parts[-1] = pieces[-1]
                else:
                    parts.append(piece)
            merged[tuple(parts)] += times
        words = merged
    return pieces


@pytest.mark.heavy
def test_it_learns_the_commonest_pairs(trained, texts):
    pieces = list(trained.codec.get_vocab().items())
    pieces = [piece for piece, _ in sorted(pieces, key=lambda item: item[1])]
    assert pieces[:5] == ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"]
    assert pieces[5:] == pieces_by_hand(texts, 595)


def test_ids_are_the_librarys_and_special_tokens_stay_out_of_text(
    trained, texts, tmp_path
):
    trained.save(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*texts, "größer 猫☃ x", "a" * 101, ""):
        assert (
            trained.encode(text) == library.encode(text, add_special_tokens=False).ids
        )
    assert library.encode("the").tokens == ["[CLS]", "the", "[SEP]"]
    assert not {*trained.special_tokens.values()} & {
        *trained.encode("[CLS] [MASK] [SEP]")
    }
    assert trained.encode("[MASK]", allow_special=True) == [3]
    assert trained.encode("☃") == [4]
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.fingerprint) == ("wordpiece", trained.fingerprint)
    assert (loaded.prefix_ids, loaded.pad_id, loaded.lossless) == ((0,), 2, False)
    assert loaded.special_tokens == {"[CLS]": 0, "[SEP]": 1, "[PAD]": 2, "[MASK]": 3}


def test_other_tools_put_any_literals_around_a_text(texts, tmp_path):
    train_tokenizer(config(bos="$A", eos="end:1"), texts).save(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("the").tokens == ["$A", "the", "end:1"]


def test_case_and_accents(texts):
    lower = train_tokenizer(config(lowercase=True, vocab_size=300), texts)
    assert lower.encode("THÉ") == lower.encode("the")
    cased = train_tokenizer(config(vocab_size=400), texts)
    assert cased.encode("THÉ") != cased.encode("the")


def test_rare_characters_are_unknown(monkeypatch):
    monkeypatch.setattr(wordpiece, "_MAX_CHARS", 3)
    ours = train_tokenizer(config(vocab_size=10), ["ab ab ab ac zc", "[SEP]"])
    # a, b, c: by count, then by code point; "zc" has another.
    assert ours.codec.get_vocab().keys() >= {"a", "##b", "##c", "ab", "ac"}
    assert ours.encode("zc ab") == [4, ours.codec.get_vocab()["ab"]]


def test_sizes_that_do_not_do(texts):
    for size, words in (
        (20, "too small for the characters"),
        (900_000, "text is too small"),
    ):
        with pytest.raises(MaxlmError, match=words) as error:
            train_tokenizer(config(vocab_size=size), texts)
        reached = int(next(w for w in error.value.fix.split() if w.isdigit()))
        assert train_tokenizer(config(vocab_size=reached), texts).vocab_size == reached
    with pytest.raises(MaxlmError, match="no text to train"):
        train_tokenizer(config(), [""])
