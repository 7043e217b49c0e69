"""When tiktoken stands in for tokenizers: only where ids stay the same."""

import itertools
import json
import random
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from maxlm.data.tokenizer import ranks, train_tokenizer
from maxlm.data.tokenizer.huggingface import HuggingFaceModel
from maxlm.data.tokenizer.patterns import PATTERN, PATTERNS
from maxlm.data.tokenizer.pieces import byte_alphabet
from maxlm.data.tokenizer.ranks import SegmentEncoder, library_ids
from tests.data.tokenizer.foreign import MAKERS
from tests.data.tokenizer.references import fuzz_texts


@pytest.fixture(autouse=True)
def fast_from_the_first_text(monkeypatch):
    monkeypatch.setattr(ranks, "FAST_CHARS", 0)


def tokenizer(merges, *, pattern=PATTERN, ignore_merges=False, further=()) -> Tokenizer:
    """Byte-level BPE with these merges, ids in the order in which tokens come up."""
    vocab: dict[str, int] = {}
    for token in [*pre_tokenizers.ByteLevel.alphabet(), *further, *map("".join, merges)]:
        vocab.setdefault(token, len(vocab))
    made = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    return made


def encoder(library: Tokenizer) -> SegmentEncoder:
    library.encode_special_tokens = True
    found = SegmentEncoder(library, library.to_str().encode())
    found(["x"])
    return found


def is_fast(library: Tokenizer) -> bool:
    return encoder(library)._ranks is not None


def test_random_merges_are_taken_only_where_every_text_gets_the_same_ids():
    chance = random.Random(0)
    taken = 0
    for _ in range(400):
        tokens = ["a", "b", "c"]
        merges = []
        for _ in range(chance.randrange(1, 9)):
            pair = tuple(chance.choices(tokens, k=2))
            if pair not in merges and len("".join(pair)) < 9:
                merges.append(pair)
                tokens.append("".join(pair))
        library = tokenizer(merges, ignore_merges=chance.random() < 0.3)
        ours = encoder(library)
        if ours._ranks is not None:
            taken += 1
            texts = ["".join(chance.choices("abc", k=chance.randrange(30))) for _ in range(60)]
            assert ours(texts) == library_ids(library, texts), merges
    assert 40 < taken < 360


def test_what_is_not_taken():
    good = [("a", "b"), ("ab", "c")]
    assert is_fast(tokenizer(good))
    assert is_fast(tokenizer(good, further=["zz"]))  # A token that no merge makes is never found,
    assert not is_fast(tokenizer(good, further=["zz"], ignore_merges=True))  # or as a whole word.
    assert not is_fast(tokenizer(good, further=["abc"]))  # Its id is no longer its rank.
    assert not is_fast(tokenizer(good, pattern=r"\w+|\W+"))
    assert not is_fast(tokenizer([("b", "c"), ("a", "b"), ("ab", "c")]))  # "abc" is a, bc.
    crowded, strange = tokenizer(good), tokenizer(good)
    crowded.add_tokens([f"<{i}>" for i in range(40)])
    strange.add_tokens(["né"])
    assert not is_fast(crowded)
    assert not is_fast(strange)
    spec = json.loads(tokenizer(good).to_str())
    spec["added_tokens"] = [{"id": 257, "content": "abc", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False)]  # fmt: skip
    assert not is_fast(Tokenizer.from_str(json.dumps(spec)))
    for name in ("roberta", "llama2", "mistral", "gemma", "t5", "bert", "smollm2"):
        assert not is_fast(MAKERS[name]())


@pytest.mark.parametrize("pattern", [PATTERN, *PATTERNS.values()])
def test_each_pattern_splits_alike(pattern):
    """Every pair of bytes merges, so that a border shows wherever it is."""
    signs = [
        "a", "aa", " ", "  ", "\n", "\r", "\t", ".", "..", "1", "11", "1111", "é", "\u00a0", "'s",
        "'S", "'ſ", "'ll", "\u2028", "A", "e\u0301", "/", "\x1c", "\x85", "\u200b",
    ]  # fmt: skip
    letters = [byte_alphabet()[byte] for byte in sorted({*"".join(signs).encode()})]
    library = tokenizer([*itertools.product(letters, letters)], pattern=pattern)
    ours = encoder(library)
    assert ours._ranks is not None
    chance = random.Random(1)
    texts = ["".join(chance.choices(signs, k=12)) for _ in range(2000)] + fuzz_texts(300, 5)
    assert ours(texts) == library_ids(library, texts)


def test_every_character_falls_under_the_same_rules(make_config, texts):
    ours = train_tokenizer(make_config("bpe", vocab_size=300), texts)
    planes = (*range(0x40000), *range(0xE0000, 0xE0200), *range(0xF0000, 0x110000, 999))
    chars = (chr(code) for code in planes if not 0xD800 <= code < 0xE000)
    # Between signs that show whether it is a letter or mark, a digit, a blank or a line end.
    all_of_them = [f"a{char}.{char} {char}1" for char in chars]
    given = ["".join(all_of_them[i : i + 4096]) for i in range(0, len(all_of_them), 4096)]
    fast = ours.encode_batch(given)
    assert ours.codec.encode_segments._ranks is not None
    assert fast == library_ids(ours.codec._tokenizer, given)


def test_texts_that_need_the_library_get_it():
    library = MAKERS["qwen"]()
    library.add_tokens([AddedToken("<tool>"), "fox"])
    spec = json.loads(library.to_str())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERNS["qwen2"]
    ours = HuggingFaceModel(json.dumps(spec).encode(), ["<|endoftext|>", "<|im_end|>"])
    texts = ["plain", "größer", "e\u0301", "a <tool> b", "foxes", "\u212b", " " * 40_000]
    texts += ["猫", "\u1100\u1161", "<|endoftext|>", "don\u2019t"]
    library = Tokenizer.from_str(json.dumps(spec))
    library.encode_special_tokens = True
    assert ours.encode_segments(texts) == library_ids(library, texts)
    taken = [ours._ordinary._ranks.takes(text) for text in texts]
    assert taken == [True, True, False, False, False, False, False, True, False, True, True]


def test_long_runs_of_blanks_never_reach_tiktoken():
    for blank in (" ", "\n", "\t \n", "\u3000"):
        for place in (0, 7, 9_999):
            text = "x" * place + blank * (20_000 // len(blank) + 1) + "y" * 5000
            assert ranks._has_long_run(text)
    assert not ranks._has_long_run((" " * 9_000 + "x") * 20)
    assert not ranks._has_long_run("")


def test_short_texts_do_not_build_it(make_config, texts, monkeypatch):
    monkeypatch.setattr(ranks, "FAST_CHARS", 1000)
    ours = train_tokenizer(make_config("bpe"), texts)
    before = ours.encode("the quick brown fox")
    assert ours.codec.encode_segments._ranks is None
    ours.encode_batch(["the quick brown fox\n" * 100])
    assert ours.codec.encode_segments._ranks is not None
    assert ours.encode("the quick brown fox") == before


def test_many_threads_keep_the_order(make_config, texts, monkeypatch):
    ours = train_tokenizer(make_config("bpe"), texts)
    given = [f"{text} {i}" for i, text in enumerate(texts * 20)]
    one = [ours.encode(text) for text in given]
    monkeypatch.setattr(ranks, "thread_count", lambda: 4)
    monkeypatch.setattr(ranks, "_CHUNK_CHARS", 500)
    assert ours.encode_batch(given) == one


def test_importing_the_package_loads_neither_tiktoken_nor_jinja():
    code = (
        "import sys, maxlm.data.tokenizer\n"
        "print([m for m in ('tiktoken', 'jinja2', 'regex', 'requests') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
