"""The settings of a tokenizer."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from maxlm.config import Config, LocalPath, MaxlmError

Kind = Literal[
    "bpe", "sentencepiece_bpe", "sentencepiece_unigram", "wordpiece", "huggingface"
]

# Printable ASCII without spaces, two or more characters: such a literal is spelled
# alike in text, in byte-level symbols and in SentencePiece pieces, and is never one of
# the 256 byte tokens.
_LITERAL = re.compile(r"[!-~]{2,64}")
_RESERVED = re.compile(r"<unk>|<0x[0-9A-F]{2}>")

CHAT_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""The special tokens of each way to write a conversation."""


class TokenizerConfig(Config):
    """Tokenizer that a run uses: a trained one, or how to train it."""

    kind: Kind = "bpe"
    """``bpe``: byte-level BPE, the fastest to train and to encode with; its
    pre-tokeniser keeps words, numbers and punctuation apart. ``sentencepiece_bpe`` (the
    Llama-2 kind) and ``sentencepiece_unigram`` (the T5 kind) learn from characters and
    fall back to bytes for rare ones; their training holds 20 to 25 times the text's
    size in memory. ``wordpiece`` (the BERT kind) is for encoders: rare words become
    [UNK], and text does not come back as it was. ``huggingface`` is someone else's,
    imported and never trained: ``path`` names it."""

    vocab_size: int = Field(default=8192, gt=0)
    """Number of ids, including 256 byte tokens and the special tokens. A larger
    vocabulary makes sequences shorter and the embedding and output matrices larger.
    Unused when ``path`` is set."""

    path: LocalPath | None = None
    """Folder of a saved tokenizer to use as it is; None trains one from the corpus."""

    bos: str = "<|endoftext|>"
    """Literal of the token that opens each document; it may be the same token as
    ``eos``."""

    eos: str = "<|endoftext|>"
    """Literal of the token that closes each document and ends generation."""

    pad: str | None = None
    """Literal of a padding token, if one is wanted; training here masks by segment
    instead."""

    extra_special_tokens: tuple[str, ...] = ()
    """Further literals with an id of their own, such as chat roles. Text in which they
    occur never produces those ids; only ``encode(..., allow_special=True)`` does.
    `maxlm tune` adds those, and those of ``chat``, that the base's tokenizer lacks, and
    grows its vocabulary for them."""

    lowercase: bool = False
    """true takes case and accents from text first (BERT uncased), for ``wordpiece``
    alone; false keeps both."""

    chat: Literal["chatml", "llama3"] | None = None
    """Form of a conversation: adds the special tokens of its roles, and a template for
    ``render_chat`` and other tools. ``chatml``: <|im_start|>role, the text, <|im_end|>
    (Qwen, SmolLM2). ``llama3``: headers with the role, <|eot_id|> after a turn. Set
    ``eos`` to the token that ends a turn if generation shall stop there. With ``path``,
    or a run to start from, the run's copy of that tokenizer gets the template in place
    of its own, and stops at the end of a turn; its vocabulary must have these special
    tokens."""

    sample_bytes: int = Field(default=100_000_000, gt=0)
    """Train on the first so many bytes of the corpus, so a corpus in order of source
    should be shuffled first. A larger sample costs time and, with SentencePiece, memory
    in proportion."""

    @field_validator("bos", "eos", "pad", "extra_special_tokens")
    @classmethod
    def _check_literals(cls, value: str | tuple[str, ...] | None):
        literals = (value,) if isinstance(value, str) else value or ()
        for literal in literals:
            if not _LITERAL.fullmatch(literal) or _RESERVED.fullmatch(literal):
                raise MaxlmError(
                    f"{literal!r} cannot be a special token",
                    fix="use 2 to 64 printable ASCII characters without spaces, other "
                    "than <unk> and byte names such as <0x0A>",
                )
        return value

    @model_validator(mode="after")
    def _check_kind(self):
        if self.kind == "huggingface" and self.path is None:
            message = "a tokenizer of kind huggingface is imported, not trained"
            fix = "set path to the folder that `maxlm tokenizer import` wrote"
            raise MaxlmError(message, fix=fix)
        if self.lowercase and self.kind != "wordpiece":
            fix = "leave lowercase out, or set kind to wordpiece"
            raise MaxlmError(f"a tokenizer of kind {self.kind} keeps case", fix=fix)
        return self

    @property
    def special_literals(self) -> tuple[str, ...]:
        """The literals of all special tokens, each once, in the order of their ids."""
        pad = () if self.pad is None else (self.pad,)
        chat = CHAT_TOKENS[self.chat] if self.chat else ()
        literals = (self.bos, self.eos, *pad, *self.extra_special_tokens, *chat)
        return tuple(dict.fromkeys(literals))
