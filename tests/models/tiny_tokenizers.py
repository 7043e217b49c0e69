"""Tokenizers of fewer ids than the tiny published models have rows."""

import json
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

SENTINELS = 20


def bert() -> Tokenizer:
    """Letters and digits, in the midst of words and at their beginnings; the mask is
    4."""
    chars = ascii_lowercase + digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *chars, *(f"##{char}" for char in chars)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def t5(sentinels: int = SENTINELS) -> Tokenizer:
    """Single characters; the first sentinel is the last id."""
    chars = [*"▁:", *ascii_lowercase, *digits]
    marks = [f"<extra_id_{n}>" for n in reversed(range(sentinels))]
    pieces = ["<pad>", "</s>", "<unk>", *chars, *marks]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *marks])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def images(rows: int, *, known: bool = False) -> Tokenizer:
    """Byte-level BPE of ``rows`` ids, and one special token past them, as Gemma 3's.

    Args:
        known: it is among the model's own, as BART's mask.
    """
    # The space first, so that no text loses it.
    alphabet = sorted(
        pre_tokenizers.ByteLevel.alphabet(), key=lambda char: (char != "Ġ", char)
    )
    alphabet = alphabet[: rows - 2]
    pieces = ["<bos>", "<eos>", *alphabet, *(["<image>"] if known else [])]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", AddedToken("<image>", lstrip=True)])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **roles: Any) -> None:
    """Beside a model's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
