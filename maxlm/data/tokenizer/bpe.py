"""Byte-level BPE, by Hugging Face tokenizers.

A text's UTF-8 bytes are spelled in a 256-character alphabet and merged by rank (Sennrich et al.,
2016, over bytes as in GPT-2). Nothing is normalised, so every text comes back as it was.
"""

import json
import re
from collections.abc import Iterator

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Codec
from maxlm.data.tokenizer.config import TokenizerConfig

# Merges never cross the borders drawn here. Every character falls under exactly one rule:
_WORD = r"[^\p{L}\p{M}\p{N}\r\n]?[\p{L}\p{M}]+"  # a word, with one space or sign before it
_NUMBER = r"\p{N}{1,3}"  # digits by threes at most, so that numbers are spelled in few ways
_SIGNS = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"  # punctuation, with the line ends that follow
_LINE_END = r"[^\S\r\n]*[\r\n]+"  # blanks at a line's end, then line ends
_BLANKS = r"[^\S\r\n]+(?!\S)|[^\S\r\n]+"  # indentation, less the blank that goes with a word
PATTERN = "|".join((_WORD, _NUMBER, _SIGNS, _LINE_END, _BLANKS))


class ByteLevelBPE(Codec):
    """A trained tokenizer.json as a ``Codec``.

    Special tokens are among its added tokens, so that other tools read the same file, but they
    are never looked for in text: `encode` places their ids itself.
    """

    file_name = "tokenizer.json"
    reserved = ""
    # By PATTERN nothing runs over a line end into a character that is not one itself.
    cut = re.compile(r"\n(?![\r\n])")

    def __init__(self, data: bytes):
        from tokenizers import Tokenizer

        self.data = data
        self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        self._tokenizer.encode_special_tokens = True
        self._spec = json.loads(data)
        of_char = {char: byte for byte, char in enumerate(byte_alphabet())}
        vocab: dict[str, int] = self._spec["model"]["vocab"]
        added = {token["id"]: token["content"] for token in self._spec["added_tokens"]}
        token_bytes = {i: bytes(of_char[c] for c in token) for token, i in vocab.items()}
        token_bytes |= {i: content.encode() for i, content in added.items()}
        self.token_bytes = [token_bytes[i] for i in range(len(token_bytes))]
        self.byte_ids = [vocab[char] for char in byte_alphabet()]

    def __reduce__(self):
        return ByteLevelBPE, (self.data,)

    def encode_segments(self, segments: list[str]) -> list[list[int]]:
        # The batch call starts a thread pool, which a later fork would then have to do without.
        if len(segments) == 1:
            return [self._tokenizer.encode(segments[0], add_special_tokens=False).ids]
        encodings = self._tokenizer.encode_batch_fast(segments, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def content(self) -> bytes:
        parts = ("normalizer", "pre_tokenizer", "model", "added_tokens")
        return json.dumps({part: self._spec[part] for part in parts}, sort_keys=True).encode()


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's convention).

    Visible Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def train_bpe(config: TokenizerConfig, segments: Iterator[str]) -> tuple[bytes, dict[str, int]]:
    """The tokenizer.json learned from ``segments``, and the special tokens' ids (the last ones).

    Memory grows with the number of distinct words, not with the text.

    Raises:
        MaxlmError: the text has too few distinct words for the vocabulary.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    literals = list(config.special_literals)
    wanted = config.vocab_size - len(literals)
    trainer = trainers.BpeTrainer(
        vocab_size=wanted, initial_alphabet=byte_alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(segments, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != wanted:
        most = reached + len(literals)
        raise MaxlmError(
            f"the text is too small for vocab_size={config.vocab_size}: it yields {most} tokens",
            fix=f"give more text or set vocab_size to {most} or less",
        )
    tokenizer.add_special_tokens(literals)
    ids = {literal: wanted + i for i, literal in enumerate(literals)}
    return tokenizer.to_str().encode(), ids
