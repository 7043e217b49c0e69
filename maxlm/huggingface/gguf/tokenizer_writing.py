"""A tokenizer as metadata of a GGUF file."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.chat import get_chat_template
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.huggingface import (
    HuggingFaceCodec,
    flatten_tokenizer_component,
)
from maxlm.data.tokenizer.sentencepiece_model import SentencePieceCodec
from maxlm.huggingface.gguf.container import Value
from maxlm.huggingface.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from maxlm.huggingface.gguf.tokenizer_reading import (
    CHAT_TEMPLATE,
    ENDS_BY_TEXT,
    HUGGINGFACE_JSON,
    KEY,
    TokenType,
    make_tokenizer_files,
)

if TYPE_CHECKING:
    import tokenizers

_NEAREST = "llama-bpe"
"""The way to split that is written where llama.cpp has no equal one."""
PROBES = (
    "Hello, world! It's 2024: isn't THAT'S odd?",
    "  two  spaces\tand\ttabs \n\n  \r\n\n end   ",
    "1 12 123 1234 12345678 3.14159 1,000,000 ½ ²³ ٣٤٥",
    "don't DON'T we'll We'Ve I'm d'accord 'quoted' ''",
    "naïve café e\u0301le\u0300ve ﬁn Ａ１ ß ǅ İi",
    "中文字符和日本語のカナ、한국어 ภาษาไทย हिन्दी العربية עברית",
    "🙂👩‍👩‍👧 👍🏽 \u200d\ufeff\u00a0\u3000x",
    "camelCaseWords snake_case_words kebab-case $var #tag @me a/b\\c",
    "f(x)=[{y:1}];//!?... --- ___ <|x|> <s> </s> \u2581 a\u2581b",
    "if (a && b) {\n\treturn c;  // d\n}\n\n\n",
    "x" * 40 + " " * 20 + "!" * 20 + "\n" * 5 + "9" * 20,
)
"""Texts in which ways to split differ."""


def make_tokenizer_metadata(
    tokenizer: Tokenizer, num_embedding_rows: int
) -> tuple[dict[str, Value], list[str]]:
    """Returns the metadata of a tokenizer by full keys, and notes for the user. Where
    GGUF has no word for how it splits a text, its tokenizer.json is among them, which
    maxlm reads and llama.cpp passes over. Raises MaxlmError: a tokenizer of a kind that
    has no counterpart."""
    codec = tokenizer.codec
    if isinstance(codec, SentencePieceCodec) and not codec.is_unigram():
        metadata = _describe_sentencepiece(codec)
        spec = None
    elif isinstance(codec, HuggingFaceCodec):
        spec = json.loads(codec.known_data)
        metadata = _describe_tokenizer_json(spec, codec)
    else:
        spec = None
        metadata = None
    if metadata is None:
        message = f"GGUF has no word for a tokenizer of the kind {tokenizer.kind}"
        fix = "write a model whose tokenizer is byte-level BPE or SentencePiece's BPE"
        raise MaxlmError(message, where="tokenizer", fix=fix)
    _fill_up(metadata, num_embedding_rows)
    metadata |= _describe_roles(tokenizer)
    notes: list[str] = []
    is_split_alike = f"{KEY}.merges" not in metadata or (
        spec is not None and _find_pre_tokenizer(spec) is not None
    )
    if spec is not None and not (is_split_alike and _is_exact(tokenizer, metadata)):
        metadata[HUGGINGFACE_JSON] = json.dumps(spec, ensure_ascii=False)
        line = "llama.cpp splits some texts differently: it has no equal tokenizer"
        notes.append(f"{line}; maxlm reads its own from the file")
    return metadata, notes


def _describe_roles(tokenizer: Tokenizer) -> dict[str, Value]:
    metadata: dict[str, Value] = {
        f"{KEY}.bos_token_id": tokenizer.bos_id,
        f"{KEY}.eos_token_id": tokenizer.eos_id,
        f"{KEY}.add_bos_token": tokenizer.opens_with_bos,
        f"{KEY}.add_eos_token": False,
    }
    if tokenizer.pad_id is not None:
        metadata[f"{KEY}.padding_token_id"] = tokenizer.pad_id
    # Others that end a continuation llama.cpp knows by their text.
    token_bytes = tokenizer.codec.token_bytes
    ends = [
        token_id
        for token_id in tokenizer.stop_ids
        if token_id != tokenizer.eos_id
        and token_bytes[token_id].decode("utf-8", "replace") not in ENDS_BY_TEXT
    ]
    if ends:
        metadata[f"{KEY}.eot_token_id"] = ends[0]
    with suppress(MaxlmError):  # It carries none, and need not.
        metadata[CHAT_TEMPLATE] = get_chat_template(tokenizer)
    return metadata


def _describe_tokenizer_json(
    spec: dict[str, Any], codec: HuggingFaceCodec
) -> dict[str, Value] | None:
    """The vocabulary and merges of a tokenizer.json; None: of a kind without
    counterpart."""
    model = spec["model"]
    if "merges" not in model:
        return None
    vocab: dict[str, int] = codec.get_vocab()
    tokens = [""] * (max(vocab.values()) + 1)
    for token, token_id in vocab.items():
        tokens[token_id] = token
    types = [TokenType.NORMAL if token else TokenType.UNUSED for token in tokens]
    for added in spec.get("added_tokens") or []:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        types[added["id"]] = kind
    for literal in codec.special_tokens:
        types[vocab[literal]] = TokenType.CONTROL
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in model["merges"]
    ]
    decoders = flatten_tokenizer_component(spec.get("decoder"))
    if any(step["type"] == "ByteLevel" for step in decoders):
        pre_tokenizer = _find_pre_tokenizer(spec)
        return {
            f"{KEY}.model": "gpt2",
            f"{KEY}.pre": pre_tokenizer.names[0] if pre_tokenizer else _NEAREST,
            f"{KEY}.tokens": tokens,
            f"{KEY}.token_type": [int(kind) for kind in types],
            f"{KEY}.merges": merges,
        }
    if not model.get("byte_fallback"):
        return None
    unknown = model.get("unk_token")
    if unknown in vocab:
        types[vocab[unknown]] = TokenType.UNKNOWN
    for byte in range(256):
        types[vocab[f"<0x{byte:02X}>"]] = TokenType.BYTE
    normalizers = flatten_tokenizer_component(spec.get("normalizer"))
    pre_tokenizers = flatten_tokenizer_component(spec.get("pre_tokenizer"))
    adds_space = any(step["type"] == "Prepend" for step in normalizers) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme") != "never"
        for step in pre_tokenizers
    )
    metadata = {
        f"{KEY}.model": "llama",
        f"{KEY}.pre": "default",
        f"{KEY}.tokens": tokens,
        f"{KEY}.token_type": [int(kind) for kind in types],
        f"{KEY}.scores": _score_by_rank(tokens, merges),
        f"{KEY}.add_space_prefix": adds_space,
    }
    if unknown in vocab:
        metadata[f"{KEY}.unknown_token_id"] = vocab[unknown]
    return metadata


def _score_by_rank(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Scores of pieces by which SentencePiece's BPE joins them in the order of merges:
    the earlier the first merge to a piece, the higher."""
    rank_by_piece: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        middle = merge.find(" ", 1)
        piece = merge[:middle] + merge[middle + 1 :]
        rank_by_piece.setdefault(piece, rank)
    worst = len(merges)
    return [-float(rank_by_piece.get(token, worst)) for token in tokens]


def _describe_sentencepiece(codec: SentencePieceCodec) -> dict[str, Value]:
    pieces = codec.list_pieces()
    kinds = {
        "unknown": TokenType.UNKNOWN,
        "control": TokenType.CONTROL,
        "unused": TokenType.UNUSED,
        "byte": TokenType.BYTE,
        "normal": TokenType.NORMAL,
    }
    metadata: dict[str, Value] = {
        f"{KEY}.model": "llama",
        f"{KEY}.pre": "default",
        f"{KEY}.tokens": [piece.text for piece in pieces],
        f"{KEY}.scores": [piece.score for piece in pieces],
        f"{KEY}.token_type": [int(kinds[piece.kind]) for piece in pieces],
        f"{KEY}.add_space_prefix": codec.adds_space_prefix,
    }
    for token_id, piece in enumerate(pieces):
        if piece.kind == "unknown":
            metadata[f"{KEY}.unknown_token_id"] = token_id
    return metadata


def _fill_up(metadata: dict[str, Value], num_rows: int) -> None:
    """Names the rows of the table that no token has, as llama.cpp's own conversion
    does: it asks for as many tokens as rows, all different."""
    tokens = metadata[f"{KEY}.tokens"]
    types = metadata[f"{KEY}.token_type"]
    for token_id, token in enumerate(tokens):
        if not token:
            tokens[token_id] = f"[PAD{token_id}]"
    for token_id in range(len(tokens), num_rows):
        tokens.append(f"[PAD{token_id}]")
        types.append(int(TokenType.UNUSED))
        if f"{KEY}.scores" in metadata:
            metadata[f"{KEY}.scores"].append(-float(num_rows))


def _find_pre_tokenizer(spec: Mapping[str, Any]) -> PreTokenizer | None:
    """Finds the way to split that does what a tokenizer.json says, by what becomes of
    texts; of several, the one with the same merges and normalizer."""
    splits = _split_probes(spec.get("pre_tokenizer"))
    ignores_merges = bool(spec["model"].get("ignore_merges"))
    equal = [
        candidate
        for candidate in PRE_TOKENIZERS
        if _split_probes(candidate.spec) == splits
    ]

    def count_differences(candidate: PreTokenizer) -> int:
        differs_in_merges = candidate.ignores_merges != ignores_merges
        return differs_in_merges + (candidate.normalizer != spec.get("normalizer"))

    return min(equal, key=count_differences, default=None)


def _split_probes(pre_tokenizer: dict[str, Any] | None) -> list[list[str]]:
    """What a pre-tokenizer makes of the probes, as characters of bytes."""
    if pre_tokenizer is None:
        return [[probe] for probe in PROBES]
    library = _open_empty(pre_tokenizer).pre_tokenizer
    assert library is not None
    return [[part for part, _ in library.pre_tokenize_str(probe)] for probe in PROBES]


def _open_empty(pre_tokenizer: dict[str, Any]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Library

    model = {"type": "BPE", "vocab": {}, "merges": []}
    spec = {"version": "1.0", "pre_tokenizer": pre_tokenizer, "model": model}
    return Library.from_str(json.dumps(spec))


def _is_exact(tokenizer: Tokenizer, metadata: Mapping[str, Value]) -> bool:
    """Whether what a reader makes of the metadata has the tokenizer's ids of all
    probes."""
    from tokenizers import Tokenizer as Library

    stored = dict(metadata)
    for key in (f"{KEY}.token_type", f"{KEY}.scores"):
        if key in stored:
            stored[key] = np.array(stored[key])  # as a file's lists are read
    files = make_tokenizer_files(stored, "tokenizer")
    reread = Library.from_str(files["tokenizer.json"].decode())
    reread.encode_special_tokens = True
    return all(
        reread.encode(probe, add_special_tokens=False).ids == tokenizer.encode(probe)
        for probe in PROBES
    )
