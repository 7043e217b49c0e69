"""Training: repeatable, bounded, and clear about texts it cannot learn from."""

import os
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer

KINDS = ["bpe", "sentencepiece_bpe", "sentencepiece_unigram"]

_TRAIN_ELSEWHERE = """
import json, sys
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer
config, texts = json.load(sys.stdin)
print(train_tokenizer(TokenizerConfig(**config), texts).fingerprint)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_tokenizer_on_any_number_of_threads(make_config, texts, kind):
    import json

    config = make_config(kind)
    request = json.dumps([config.model_dump(), texts])
    root = Path(__file__).parents[3]
    found = {train_tokenizer(config, iter(texts)).fingerprint}
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", _TRAIN_ELSEWHERE]
        done = subprocess.run(
            command, input=request, env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout.strip())
    assert len(found) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_sample_is_read(make_config, texts, kind):
    sample = "".join(texts)
    limited = make_config(kind, sample_bytes=len(sample.encode()))
    endless = (text for text in (sample, *repeat("zzz qqq", 3)))
    tokenizer = train_tokenizer(limited, endless)
    assert tokenizer.fingerprint == train_tokenizer(limited, [sample]).fingerprint
    assert next(endless) == "zzz qqq"


def test_a_sample_may_end_inside_a_character(make_config, texts):
    config = make_config("bpe", vocab_size=300)
    whole = "".join(texts)
    cut = config.model_copy(update={"sample_bytes": len(whole.encode()) + 1})
    assert (
        train_tokenizer(cut, [whole + "猫"]).fingerprint
        == train_tokenizer(config, [whole]).fingerprint
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_str_train_alike_and_stray_bytes_are_left_out(make_config, texts, kind):
    config = make_config(kind)
    as_bytes = [text.encode() for text in texts]
    wanted = train_tokenizer(config, texts).fingerprint
    assert train_tokenizer(config, as_bytes).fingerprint == wanted
    assert train_tokenizer(config, [*as_bytes, b"\xff\xfe\x80"]).fingerprint == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", [[], [""], [b"", b"\xff\xff"], ["<|endoftext|>"]])
def test_no_text(kind, empty):
    with pytest.raises(MaxlmError) as error:
        train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), empty)
    assert str(error.value) == ("no text to train a tokenizer on; give text that is not empty")


@pytest.mark.parametrize(
    ("settings", "size", "parts"),
    [
        ({"pad": "<|pad|>"}, 258, "256 bytes, 2 special"),
        ({"kind": "sentencepiece_bpe"}, 258, "256 bytes, 1 special, 1 unknown"),
    ],
)
def test_no_room_for_bytes(settings, size, parts):
    with pytest.raises(MaxlmError) as error:
        train_tokenizer(TokenizerConfig(vocab_size=size - 1, **settings), ["text"])
    assert str(error.value) == (
        f"vocab_size={size - 1} has no room for every byte and special token; "
        f"set it to {size} ({parts}) or more"
    )


@pytest.mark.parametrize(("kind", "most"), list(zip(KINDS, (260, 265, 261), strict=True)))
def test_text_too_small_for_the_vocabulary(kind, most):
    texts = ["aaa aaa"]
    with pytest.raises(MaxlmError) as error:
        train_tokenizer(TokenizerConfig(kind=kind, vocab_size=5000), texts)
    assert str(error.value) == (
        f"the text is too small for vocab_size=5000: it yields {most} tokens; "
        f"give more text or set vocab_size to {most} or less"
    )
    train_tokenizer(TokenizerConfig(kind=kind, vocab_size=most), texts)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_too_many_characters_for_sentencepiece(kind):
    with pytest.raises(MaxlmError) as error:
        train_tokenizer(TokenizerConfig(kind=kind, vocab_size=270), ["abcdefghijklmnopqrstuvwxyz"])
    assert str(error.value) == (
        "vocab_size=270 is too small for the characters of the text; set vocab_size to 284 or more"
    )


def test_long_documents_train_sentencepiece_in_whole(make_config, texts):
    # SentencePiece silently skips sentences longer than 4192 bytes.
    long = "".join(texts) * 3
    tokenizer = train_tokenizer(make_config("sentencepiece_bpe"), [long])
    assert len(tokenizer.encode(long)) < 0.7 * len(long.encode())
    dense = "abcdefgh" * 2000
    tokenizer = train_tokenizer(TokenizerConfig(kind="sentencepiece_bpe", vocab_size=272), [dense])
    assert len(tokenizer.encode(dense)) <= len(dense) / 4


def test_training_takes_no_more_memory_for_more_text_of_the_same_words():
    code = """
import random, resource
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer
chance = random.Random(0)
words = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
line = " ".join(chance.choices(words, k=150_000))  # A megabyte.
peaks = []
for megabytes in (6, 6, 16):
    train_tokenizer(TokenizerConfig(vocab_size=1200), (line + str(i) for i in range(megabytes)))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[2] - peaks[1])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 7  # MB, of 10 MB more.
