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
from maxlm.data.tokenizer.patterns import PATTERN
from maxlm.data.tokenizer.pieces import byte_alphabet
from maxlm.data.tokenizer.ranks import SegmentEncoder


class ByteLevelBPE(Codec):
    """A trained tokenizer.json as a ``Codec``.

    Special tokens are among its added tokens, so that other tools read the same file, but they
    are never looked for in text: `encode` places their ids itself.
    """

    file_name = "tokenizer.json"
    reserved = ""
    # By PATTERN nothing runs over a line end into a character that is not one itself, nor from a
    # sign or letter into a space.
    cut = re.compile(r"\n(?![\r\n])|[!-~](?= )")

    def __init__(self, data: bytes):
        from tokenizers import Tokenizer

        self.data = data
        self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        self._tokenizer.encode_special_tokens = True
        self.encode_segments = SegmentEncoder(self._tokenizer, data)
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

    def content(self) -> bytes:
        parts = ("normalizer", "pre_tokenizer", "model", "added_tokens")
        return json.dumps({part: self._spec[part] for part in parts}, sort_keys=True).encode()


def train_bpe(config: TokenizerConfig, segments: Iterator[str]) -> tuple[bytes, dict[str, int]]:
    """The tokenizer.json learned from ``segments``, and the special tokens' ids (the last ones).

    The commonest pair merges first; of equally common ones that of the lower ids. Memory grows with
    the number of distinct words, not with the text (and by 256 segments, which the library reads
    ahead).

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
    require_size(config, tokenizer.get_vocab_size() + len(literals))
    tokenizer.add_special_tokens(literals)
    ids = {literal: wanted + i for i, literal in enumerate(literals)}
    return tokenizer.to_str().encode(), ids


def require_size(config: TokenizerConfig, reached: int) -> None:
    """Raises: MaxlmError: training came to fewer tokens than were asked for."""
    if reached < config.vocab_size:
        raise MaxlmError(
            f"the text is too small for vocab_size={config.vocab_size}: it yields {reached} tokens",
            fix=f"give more text or set vocab_size to {reached} or less",
        )
