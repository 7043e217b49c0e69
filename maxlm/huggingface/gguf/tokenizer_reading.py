"""The tokenizer of a GGUF file as the files of a Hugging Face folder."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from enum import IntEnum
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.gguf.container import Value
from maxlm.huggingface.gguf.pre_tokenizers import PRE_TOKENIZER_BY_NAME

KEY = "tokenizer.ggml"
CHAT_TEMPLATE = "tokenizer.chat_template"
HUGGINGFACE_JSON = "tokenizer.huggingface.json"
NO_TOKENIZER = ("no_vocab", "none")
SPACE = "\u2581"
_OTHER = "convert the model again with a current llama.cpp, or use another file"
_ROLES = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}
_FURTHER_ENDS = ("eot_token_id", "eom_token_id")
ENDS_BY_TEXT = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>"),
        *("<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "[EOT]", "[EOS]"),
        *("<|end_of_text|>", "<end_of_utterance>"),
    )
)
"""Tokens that llama.cpp ends a continuation at, whatever a file says."""


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type`` (SentencePiece's types of pieces)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def has_tokenizer(metadata: Mapping[str, Value]) -> bool:
    """Whether a file has a tokenizer."""
    model = metadata.get(f"{KEY}.model")
    return f"{KEY}.tokens" in metadata and model not in NO_TOKENIZER


def read_token_ids(metadata: Mapping[str, Value]) -> dict[str, int]:
    """Returns config.json's ids of tokens that open, end and pad."""
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "pad"):
        token_id = metadata.get(f"{KEY}.{_ROLES[role]}")
        if type(token_id) is int:
            ids[f"{role}_token_id"] = token_id
    return ids


def make_tokenizer_files(metadata: Mapping[str, Value], where: str) -> dict[str, bytes]:
    """Returns tokenizer.json, tokenizer_config.json, the chat template and
    generation_config.json of a file's metadata, by name. Raises MaxlmError: a tokenizer
    of a kind that is not implemented, or one that lacks a part."""
    return _TokenizerReader(metadata, where).make_files()


class _TokenizerReader:
    def __init__(self, metadata: Mapping[str, Value], where: str):
        self._metadata = metadata
        self._where = where
        tokens = metadata.get(f"{KEY}.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise self._lacks("tokens")
        types = self._read_array("token_type", len(tokens), TokenType.NORMAL)
        self._types: list[int] = types.tolist()
        # Rows of the table that no token has, named by whoever wrote the file.
        count = len(tokens)
        while count > 1 and self._is_padding(count - 1, tokens[count - 1]):
            count -= 1
        self._tokens: list[str] = tokens[:count]

    def make_files(self) -> dict[str, bytes]:
        model = self._metadata.get(f"{KEY}.model")
        stored = self._metadata.get(HUGGINGFACE_JSON)
        if isinstance(stored, str):
            spec = self._parse(stored)
            opening = self._make_spec(adds_bos=False)
            spec["post_processor"] = opening["post_processor"]
        elif model == "gpt2":
            spec = self._make_byte_level_bpe()
        elif model == "llama":
            spec = self._make_sentencepiece_bpe()
        else:
            message = f"{KEY}.model={str(model)[:80]!r} is not implemented"
            fix = "use a model whose tokenizer is of the kind gpt2 or llama"
            raise MaxlmError(message, where=self._where, fix=fix)
        files = {"tokenizer.json": _to_json(spec)}
        files["tokenizer_config.json"] = _to_json(self._make_config())
        template = self._metadata.get(CHAT_TEMPLATE)
        if isinstance(template, str) and template:
            files["chat_template.jinja"] = template.encode()
        files["generation_config.json"] = _to_json(self._make_generation_config())
        return files

    def _make_byte_level_bpe(self) -> dict[str, Any]:
        merges = self._metadata.get(f"{KEY}.merges")
        if not isinstance(merges, list):
            raise self._lacks("merges")
        name = self._metadata.get(f"{KEY}.pre", "default")
        pre_tokenizer = PRE_TOKENIZER_BY_NAME.get(name)
        if pre_tokenizer is None:
            near = get_close_matches(str(name), PRE_TOKENIZER_BY_NAME, n=1)
            message = f"{KEY}.pre={str(name)[:80]!r} is not implemented"
            fix = "use the model's Hugging Face folder"
            if near:
                fix = f"the nearest that is: {near[0]}; {fix}"
            raise MaxlmError(message, where=self._where, fix=fix)
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre_tokenizer.ignores_merges,
            "vocab": self._make_vocab(),
            # A merge's first part may itself begin with a space.
            "merges": [_split_merge(merge) for merge in merges],
        }
        return {
            **self._make_spec(pre_tokenizer.adds_bos),
            "normalizer": pre_tokenizer.normalizer,
            "pre_tokenizer": pre_tokenizer.spec,
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": model,
        }

    def _make_sentencepiece_bpe(self) -> dict[str, Any]:
        scores = self._read_array("scores", len(self._tokens), 0.0)
        unknown = [
            token
            for token, kind in zip(self._tokens, self._types, strict=False)
            if kind == TokenType.UNKNOWN
        ]
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown[0] if unknown else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": TokenType.BYTE in self._types,
            "ignore_merges": False,
            "vocab": self._make_vocab(),
            "merges": self._find_merges(scores),
        }
        adds_space = self._read_flag("add_space_prefix", default=True)
        normalizers = [
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        ]
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if adds_space:
            normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            **self._make_spec(adds_bos=True),
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": model,
        }

    def _find_merges(self, scores: np.ndarray) -> list[tuple[str, str]]:
        """Returns all ways to join two pieces to a third, those of the best scores
        first: SentencePiece's BPE joins the neighbours whose piece scores best."""
        score_by_piece = {
            token: float(score)
            for token, score, kind in zip(
                self._tokens, scores, self._types, strict=False
            )
            if kind == TokenType.NORMAL
        }
        ids = {token: token_id for token_id, token in enumerate(self._tokens)}
        merges: list[tuple[float, int, int, str, str]] = []
        for piece, score in score_by_piece.items():
            for middle in range(1, len(piece)):
                first = piece[:middle]
                second = piece[middle:]
                if first in score_by_piece and second in score_by_piece:
                    merges.append((-score, ids[first], ids[second], first, second))
        merges.sort()
        return [(first, second) for *_, first, second in merges]

    def _make_vocab(self) -> dict[str, int]:
        """Returns every token's id. Raises MaxlmError: a token is there twice."""
        vocab = {token: token_id for token_id, token in enumerate(self._tokens)}
        if len(vocab) != len(self._tokens):
            message = f"damaged GGUF file ({KEY}.tokens has a token twice)"
            raise MaxlmError(message, where=self._where, fix="download it again")
        return vocab

    def _make_spec(self, adds_bos: bool) -> dict[str, Any]:
        """What tokenizer.json has of both kinds alike."""
        adds_bos = self._read_flag("add_bos_token", default=adds_bos)
        added = [
            {
                "id": token_id,
                "content": self._tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != TokenType.USER_DEFINED,
            }
            for token_id, kind in enumerate(self._types[: len(self._tokens)])
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        ]
        single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        special: dict[str, Any] = {}
        bos = self._find_role("bos")
        if adds_bos and bos is not None:
            token_id, token = bos
            opening = {"SpecialToken": {"id": token, "type_id": 0}}
            single.insert(0, opening)
            pair.insert(0, opening)
            special = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": single,
                "pair": pair,
                "special_tokens": special,
            },
        }

    def _make_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for role in _ROLES:
            named = self._find_role(role)
            if named is not None:
                config[f"{role}_token"] = named[1]
        return config

    def _make_generation_config(self) -> dict[str, Any]:
        ids: list[int] = []
        for key in (_ROLES["eos"], *_FURTHER_ENDS):
            token_id = self._metadata.get(f"{KEY}.{key}")
            if type(token_id) is int and token_id < len(self._tokens):
                ids.append(token_id)
        for token_id, token in enumerate(self._tokens):
            if token in ENDS_BY_TEXT:
                ids.append(token_id)
        return {"eos_token_id": list(dict.fromkeys(ids))} if ids else {}

    def _find_role(self, role: str) -> tuple[int, str] | None:
        """The id and the text of the token of a role; None: no token has it."""
        token_id = self._metadata.get(f"{KEY}.{_ROLES[role]}")
        if type(token_id) is not int or not 0 <= token_id < len(self._tokens):
            return None
        return token_id, self._tokens[token_id]

    def _read_flag(self, key: str, *, default: bool) -> bool:
        value = self._metadata.get(f"{KEY}.{key}")
        return value if type(value) is bool else default

    def _read_array(self, key: str, count: int, default: float) -> np.ndarray:
        values = self._metadata.get(f"{KEY}.{key}")
        if values is None:
            return np.full(count, default)
        if not isinstance(values, np.ndarray) or len(values) < count:
            message = f"damaged GGUF file ({KEY}.{key} is not one number a token)"
            raise MaxlmError(message, where=self._where, fix="download it again")
        return values

    def _is_padding(self, token_id: int, token: str) -> bool:
        is_named = token in (f"[PAD{token_id}]", "")
        return is_named and self._types[token_id] == TokenType.UNUSED

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            spec = json.loads(text)
        except ValueError:
            spec = None
        if not isinstance(spec, dict):
            message = f"damaged GGUF file ({HUGGINGFACE_JSON} is no JSON object)"
            raise MaxlmError(message, where=self._where, fix="download it again")
        return spec

    def _lacks(self, key: str) -> MaxlmError:
        message = f"its metadata lacks {KEY}.{key}"
        return MaxlmError(message, where=self._where, fix=_OTHER)


def _split_merge(merge: str) -> list[str]:
    middle = merge.find(" ", 1)
    return [merge[:middle], merge[middle + 1 :]]


def _to_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
