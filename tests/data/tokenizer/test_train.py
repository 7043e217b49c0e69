"""Training: repeatable, bounded, and clear about texts it cannot learn from."""

import json
import os
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from tests.errors import message

KINDS = ["bpe", "sentencepiece_bpe", "sentencepiece_unigram"]


@pytest.mark.heavy
def test_the_same_text_gives_the_same_tokenizer_on_any_number_of_threads(
    make_config, texts
):
    code = """
import json, sys
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
configs, texts = json.load(sys.stdin)
print(*(train_tokenizer(TokenizerConfig(**config), texts).fingerprint for config in configs))
"""
    configs = [make_config(kind) for kind in (*KINDS, "wordpiece")]
    here = [train_tokenizer(config, iter(texts)).fingerprint for config in configs]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([[config.model_dump() for config in configs], texts]),
        env={
            **os.environ,
            "RAYON_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[3]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == here


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_sample_is_read(make_config, texts, kind):
    sample = "".join(texts)
    limited = make_config(kind, sample_bytes=len(sample.encode()))
    endless = (text for text in (sample, *repeat("zzz qqq", 3)))
    tokenizer = train_tokenizer(limited, endless)
    assert tokenizer.fingerprint == train_tokenizer(limited, [sample]).fingerprint
    assert next(endless) == "zzz qqq"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", [[], [b"", b"\xff\xff"], ["<|endoftext|>"]])
def test_no_text(kind, empty):
    with pytest.raises(MaxlmError, match="no text to train a tokenizer on; give text"):
        train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), empty)


@pytest.mark.parametrize(
    ("settings", "size", "parts"),
    [
        ({"pad": "<|pad|>"}, 258, "256 bytes, 2 special"),
        ({"kind": "sentencepiece_bpe"}, 258, "256 bytes, 1 special, 1 unknown"),
    ],
)
def test_no_room_for_bytes(settings, size, parts):
    error_text = message(
        train_tokenizer, TokenizerConfig(vocab_size=size - 1, **settings), ["text"]
    )
    assert error_text.startswith(f"vocab_size={size - 1} has no room for every byte")
    assert error_text.endswith(f"set it to {size} ({parts}) or more")


@pytest.mark.parametrize(
    ("kind", "most"), list(zip(KINDS, (260, 265, 261), strict=True))
)
def test_text_too_small_for_the_vocabulary(kind, most):
    texts = ["aaa aaa"]
    error_text = message(
        train_tokenizer, TokenizerConfig(kind=kind, vocab_size=5000), texts
    )
    assert error_text.startswith(
        f"the text is too small for vocab_size=5000: it yields {most} tokens"
    )
    train_tokenizer(TokenizerConfig(kind=kind, vocab_size=most), texts)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_too_many_characters_for_sentencepiece(kind):
    config = TokenizerConfig(kind=kind, vocab_size=270)
    error_text = message(train_tokenizer, config, ["abcdefghijklmnopqrstuvwxyz"])
    assert error_text.endswith(
        "small for the characters of the text; set vocab_size to 284 or more"
    )


def test_long_documents_train_sentencepiece_in_whole(make_config, texts):
    # SentencePiece silently skips sentences longer than 4192 bytes.
    long = "".join(texts) * 3
    tokenizer = train_tokenizer(make_config("sentencepiece_bpe"), [long])
    assert len(tokenizer.encode(long)) < 0.7 * len(long.encode())
    dense = "abcdefgh" * 2000
    tokenizer = train_tokenizer(
        TokenizerConfig(kind="sentencepiece_bpe", vocab_size=272), [dense]
    )
    assert len(tokenizer.encode(dense)) <= len(dense) / 4
