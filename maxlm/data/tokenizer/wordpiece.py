"""WordPiece (Schuster & Nakajima, 2012) as BERT has it, by Hugging Face tokenizers.

The library's own WordPiece trainer numbers characters in the order of a hash table, which differs
from run to run, and breaks ties between pairs by these numbers. So its BPE trainer, which it also
calls for WordPiece, is given words in which each character at a word's start and each one within
a word is a letter of its own, numbered by code point: the same merges, and always the same.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.config import TokenizerConfig

UNKNOWN = "[UNK]"
PREFIX = "##"
# As in BERT: a longer word is unknown, and so is one with a rarer character.
_WORD_CHARS = 100
_ALPHABET = 1000
# Private code points, by place in the alphabet: at a word's start, and within one.
_START, _WITHIN = 0x100000, 0xF0000
_REPEATED = 4096


def train_wordpiece(config: TokenizerConfig, segments: Iterator[str]) -> tuple[bytes, list[str]]:
    """Returns the tokenizer.json learned from ``segments``, and its special tokens' literals.

    Pairs are merged by count, as the library does and BERT's authors did not publish. Memory
    grows with the number of distinct words.

    Raises:
        MaxlmError: the text has too few pieces, or too many characters, for the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    split = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for segment in segments:
        found = split.pre_tokenize_str(normalizer.normalize_str(segment))
        words.update(word for word, _ in found if len(word) <= _WORD_CHARS)
    literals = list(dict.fromkeys((*config.special_literals, UNKNOWN)))
    pieces = _learn(words, config.vocab_size - len(literals))
    reached = len(pieces) + len(literals)
    if reached > config.vocab_size:
        raise MaxlmError(
            f"vocab_size={config.vocab_size} is too small for the characters of the text",
            fix=f"set vocab_size to {reached} or more",
        )
    require_size(config, reached)
    vocab = {piece: i for i, piece in enumerate([*literals, *pieces])}
    tokenizer = Tokenizer(
        models.WordPiece(vocab, unk_token=UNKNOWN, max_input_chars_per_word=_WORD_CHARS)
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(literals)
    spec = json.loads(tokenizer.to_str())
    spec["post_processor"] = _post_processor(config, vocab)
    return json.dumps(spec, ensure_ascii=False, separators=(",", ":")).encode(), literals


def require_size(config: TokenizerConfig, reached: int) -> None:
    """Check that training reached as many tokens as were asked for.

    Raises:
        MaxlmError: the text yields too few.
    """
    if reached < config.vocab_size:
        raise MaxlmError(
            f"the text is too small for vocab_size={config.vocab_size}: it yields {reached} tokens",
            fix=f"give more text or set vocab_size to {reached} or less",
        )


def _post_processor(config: TokenizerConfig, vocab: dict[str, int]) -> dict[str, Any]:
    """The post_processor that puts bos before a text and eos after it.

    As JSON: the library's own constructor reads "$B" and "a:1" in literals as its signs.
    """
    names = config.bos, config.eos
    bos, eos = ({"SpecialToken": {"id": name, "type_id": 0}} for name in names)
    first, second = (
        {"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": [bos, first, eos],
        "pair": [first, second],
        "special_tokens": {
            name: {"id": name, "ids": [vocab[name]], "tokens": [name]} for name in sorted(names)
        },
    }


def _learn(words: Counter[str], size: int) -> list[str]:
    """Up to ``size`` pieces, or all characters if they are more, those within words marked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    chars: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            chars[char] += count
    kept = sorted(chars, key=lambda char: (-chars[char], char))[:_ALPHABET]
    places = {char: place for place, char in enumerate(sorted(kept))}

    def texts() -> Iterator[str]:
        for word, count in words.items():
            if all(char in places for char in word):
                rest = "".join(chr(_WITHIN + places[char]) for char in word[1:])
                text = f"{chr(_START + places[word[0]])}{rest} "
                for done in range(0, count, _REPEATED):
                    yield text * min(_REPEATED, count - done)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=max(size, 0), show_progress=False)
    )
    vocab = tokenizer.get_vocab()
    letters = sorted(places)

    def spelled(piece: str) -> str:
        within = ord(piece[0]) < _START
        mark = PREFIX if within else ""
        return mark + "".join(letters[ord(char) & 0xFFFF] for char in piece)

    return [spelled(piece) for piece in sorted(vocab, key=vocab.__getitem__)]
