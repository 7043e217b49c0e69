"""Promise: a text never has fewer tokens than its bound says, for any tokenizer and any
text; a text that is far too long is told from its bound."""

import json
from pathlib import Path

import pytest

from maxlm.data.tokenizer.bounds import make_token_count_bound
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.huggingface import build_byte_alphabet
from maxlm.data.tokenizer.load import import_tokenizer
from tests.data.tokenizer.foreign import MAKERS, write_checkpoint
from tests.data.tokenizer.references import fuzz_texts, long_texts

# What normalizers make shorter: canonical compositions (the first is one character of
# four), signs that stand for a letter, wide and mathematical letters, accents and
# controls that some drop; and words that are unknown as a whole.
SHRINKING = [
    "\u03b1\u0313\u0300\u0345" * 50,
    "\u1112\u1161\u11ab" * 50,
    "\u212a\u2126\u1fef" * 50,
    "\U0001d400ｆｕｌｌﬁ" * 30,
    "e\u0301\u0301\u0301" * 40,
    "a\u0000\u200b\ufffd\x07" * 40,
    "日本" * 300,
    "unknownword" * 60,
    " " * 500,
    " \t\u2003\u3000\xa0" * 60,
    "",
]


def list_special_texts(tokenizer: Tokenizer) -> list[str]:
    literals = [*tokenizer.special.ids]
    spaced = [f"  \u3000 {literal} \n  " for literal in literals]
    return ["".join(literals) * 20, "".join(spaced) * 20, " ".join(literals) * 20]


def check_bound(tokenizer: Tokenizer) -> None:
    bound = make_token_count_bound(tokenizer)
    texts = [
        *SHRINKING,
        *fuzz_texts(150, 7),
        *long_texts(5_000),
        *list_special_texts(tokenizer),
    ]
    texts += ["\ud800 lone \udfff", "\ufdd0" * 30]
    for text in texts:
        for allow_special in (False, True):
            count = len(tokenizer.encode(text, allow_special=allow_special))
            assert bound(text) <= count, (text[:80], allow_special)


def test_no_text_of_a_trained_tokenizer_has_fewer_tokens(tokenizer):
    check_bound(tokenizer)
    # The bytes of no token but single ones.
    assert make_token_count_bound(tokenizer)("\x00\x01" * 100) == 200


@pytest.mark.parametrize("name", MAKERS)
def test_no_text_of_an_imported_tokenizer_has_fewer_tokens(name, tmp_path):
    tokenizer = import_tokenizer(write_checkpoint(tmp_path, name))
    check_bound(tokenizer)
    text = "The quick brown fox: 12345 lazy dogs\n" * 400_000  # 15 MB
    assert make_token_count_bound(tokenizer)(text) > 8192


def test_bytes_without_a_token_do_not_count(tmp_path: Path):
    """As of SmolLM2, whose vocabulary lacks some control characters."""
    folder = write_checkpoint(tmp_path, "smollm2")
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    alphabet = build_byte_alphabet()
    for byte in (0x04, 0x06, 0xF1, 0xC0):
        del data["model"]["vocab"][alphabet[byte]]
    file.write_text(json.dumps(data))
    tokenizer = import_tokenizer(folder)
    assert tokenizer.encode("\x04" * 100) == []
    bound = make_token_count_bound(tokenizer)
    assert bound("\x04" * 100) == 0 < bound("fox" * 100)
    check_bound(tokenizer)


def test_no_text_of_a_sentencepiece_model_has_fewer_tokens(tmp_path: Path):
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox\n"] * 50),
        model_prefix=str(tmp_path / "any"),
        model_type="unigram",
        vocab_size=60,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    check_bound(import_tokenizer(tmp_path / "any.model"))
