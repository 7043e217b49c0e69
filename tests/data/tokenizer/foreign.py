"""Small tokenizers in the manner of well-known models, built with the `tokenizers`
library."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\n    return x + 12345\n",
    "größer über Straße, où été; don't we'll it's\n" * 3,
    "def f(x):\n    return [y for y in x if y > 10]\n\n\nclass A:\n        pass\n" * 3,
    "猫が好きです。犬も好きです。\n" * 3,
    "the the  the   the    spaces and the\ttabs\r\n" * 3,
]

LLAMA_DECODER = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def smollm2() -> Tokenizer:
    """Byte-level BPE: digits apart, then GPT-2's pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_bytes(tokenizer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(
        [AddedToken("<tool>", normalized=False), AddedToken("    "), "fox hole"]
    )
    return tokenizer


def qwen() -> Tokenizer:
    """Byte-level BPE after NFC, with the special tokens' ids after a hole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _train_bytes(tokenizer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return tokenizer


def roberta() -> Tokenizer:
    """Byte-level BPE that puts a space before a text, and swallows the one before
    <mask>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    _train_bytes(tokenizer)
    tokenizer.add_special_tokens(["<s>", "</s>", AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>"))
    )
    return tokenizer


def llama2() -> Tokenizer:
    """BPE of characters with byte fallback; the normaliser puts the mark before a
    text."""
    tokenizer = _fallback()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = LLAMA_DECODER
    tokenizer.post_processor = _opened_by("<s>", tokenizer)
    return tokenizer


def gemma() -> Tokenizer:
    """The same with nothing before a text, and runs of marks among the added tokens."""
    tokenizer = _fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    tokenizer.post_processor = _opened_by("<s>", tokenizer)
    return tokenizer


def t5() -> Tokenizer:
    """Unigram without bytes; special tokens are pieces of the likeliest score."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<extra_id_0>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def bert() -> Tokenizer:
    """WordPiece after lower case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return tokenizer


MAKERS = {
    make.__name__: make for make in (smollm2, qwen, roberta, llama2, gemma, t5, bert)
}


def added(content: str) -> dict:
    """A token as tokenizer_config.json may have it."""
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "special": True,
    }


ROLES = {
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": added("<|im_end|>")},
    "qwen": {"bos_token": None, "eos_token": "<|endoftext|>", "add_bos_token": False},
    "roberta": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "llama2": {"bos_token": added("<s>"), "eos_token": "</s>"},
    "gemma": {"bos_token": "<s>", "eos_token": "</s>"},
    "t5": {"eos_token": "</s>", "pad_token": "<pad>"},
    "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
}


def write_checkpoint(folder: Path, name: str) -> Path:
    """A checkpoint's folder, but for its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    data = json.loads(MAKERS[name]().to_str())
    if name == "qwen":
        # A hole before the special tokens, as in files whose vocabulary was rounded up.
        for token in data["added_tokens"]:
            token["id"] += 3
            data["model"]["vocab"][token["content"]] = token["id"]
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(ROLES[name], indent=4))
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (folder / "config.json").write_text('{"model_type": "any"}')
    return folder


def _train_bytes(tokenizer: Tokenizer) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)


def _fallback() -> Tokenizer:
    """<unk>, <s>, </s>, the bytes, and what BPE learns from characters."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece for piece in model["vocab"] if piece not in names]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(names)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def _opened_by(bos: str, tokenizer: Tokenizer):
    return processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
