"""tiktoken's rank files (a line a token: its bytes in base64, and its rank) as a
tokenizer.json.

The ranks say which tokens there are and which merges come first, not which pairs merge:
each token longer than a byte is split by the ranks below its own. What is left are the
two parts of its merge; a token of which more is left can only be a whole piece of text
(``ignore_merges``).
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.huggingface import build_byte_alphabet
from maxlm.runtime.json_types import JsonObject

END_OF_TEXT = "<|endoftext|>"
_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_SUFFIX = f"(?i:{_CONTRACTIONS})"
_SPACES = r"\s+(?!\S)|\s+"
_SIGNS = r"[^\s\p{L}\p{N}]+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _make_gpt4_pattern(number: str) -> str:
    """Words with one sign before them, numbers, signs with the line ends after them,
    blanks."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"{_SUFFIX}|{words}|{number}| ?{_SIGNS}[\r\n]*|\s*[\r\n]+|{_SPACES}"


def _make_cased_pattern(suffix: str, number: str) -> str:
    """As GPT-4's, with words cut where a lower-case letter is followed by an upper-case
    one."""
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}"
    words += rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{number}| ?{_SIGNS}[\r\n/]*|\s*[\r\n]+|{_SPACES}"


PATTERNS = {
    "gpt2": rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?{_SIGNS}|{_SPACES}",
    "cl100k_base": _make_gpt4_pattern(r"\p{N}{1,3}"),
    "o200k_base": _make_cased_pattern(f"{_SUFFIX}?", r"\p{N}{1,3}"),
    "qwen2": _make_gpt4_pattern(r"\p{N}"),
    "tekken": _make_cased_pattern("", r"\p{N}"),
}
"""Patterns by which well-known tokenizers split a text before they merge, by name;
Llama 3 splits as cl100k_base, gpt-oss as o200k_base. The first rule that matches takes
a character."""
# Published files, whose pattern and special tokens are tiktoken's own, by SHA-256 of
# the file.
_PUBLISHED = {
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
}
_PUBLISHED_SPECIAL_TOKENS: dict[str, dict[str, int]] = {
    "cl100k_base": {
        END_OF_TEXT: 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
    "o200k_base": {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
}


def is_rank_file(data: bytes) -> bool:
    """Tells whether data are a rank file, whatever its name: Llama 3 calls its
    tokenizer.model."""
    return _LINE.match(data) is not None


def convert_rank_file(
    data: bytes,
    error_location: str,
    pattern: str | None = None,
    special_tokens: Mapping[str, int | None] | None = None,
) -> tuple[bytes, dict[str, int]]:
    """Makes the tokenizer.json of a rank file; also returns the ids of its special
    tokens.

    Args:
        pattern: how it splits text: a name in ``PATTERNS``, or a regular expression.
            None: the file is a published one, which is known by its content.
        special_tokens: literals of special tokens and their ids; None: the first id
            that is free after the ranks. A published file has tiktoken's own besides.

    Raises:
        MaxlmError: no pattern, or one that is none; a damaged file; a special token
            that is an ordinary one, or whose id is taken.
    """
    published = _PUBLISHED.get(hashlib.sha256(data).hexdigest())
    expression = _resolve_pattern(pattern or published, error_location)
    ranks = _parse_ranks(data, error_location)
    alphabet = build_byte_alphabet()
    spelled = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    id_by_literal: dict[str, int | None] = dict(
        _PUBLISHED_SPECIAL_TOKENS.get(published or "", {})
    )
    for literal, number in (special_tokens or {}).items():
        if number is not None or literal not in id_by_literal:
            id_by_literal[literal] = number
    special = _number_special_tokens(id_by_literal, vocab, error_location)
    merges = [
        [spelled[first], spelled[second]] for first, second in _list_merges(ranks)
    ]
    spec = _make_tokenizer_spec(expression, vocab, merges, special)
    return json.dumps(spec, ensure_ascii=False).encode(), special


def _list_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Lists the pairs that merges make tokens of, by rank. A rank file has the tokens
    alone: each is made of the two parts that merges of lower ranks leave of it. A
    single byte has no merge, nor has a token of which more parts are left."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _split_by_ranks(token, ranks, rank)
        if len(parts) == 2:
            first, second = parts
            merges.append((first, second))
    return merges


def _make_tokenizer_spec(
    expression: str,
    vocab: Mapping[str, int],
    merges: list[list[str]],
    special: Mapping[str, int],
) -> JsonObject:
    """Makes the content of a tokenizer.json: byte-level BPE of what a regular
    expression splits a text into."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Isolated",
        "invert": False,
    }
    added_tokens = [
        {
            "id": token_id,
            "content": literal,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for literal, token_id in sorted(special.items(), key=lambda item: item[1])
    ]
    return {
        "version": "1.0",
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            # Special tokens too: the library keeps ids with a gap before them only so.
            "vocab": {**vocab, **special},
            "merges": merges,
            "ignore_merges": True,
        },
    }


def _resolve_pattern(pattern: str | None, error_location: str) -> str:
    """Returns the regular expression that a pattern names, or is."""
    from tokenizers import Regex

    names = ", ".join(PATTERNS)
    if pattern is None:
        message = "a rank file does not say how text is split"
        fix = (
            f"name its pattern (--pattern of `maxlm tokenizer import`): {names}, or "
            "give a regex"
        )
        raise MaxlmError(message, where=error_location, fix=fix)
    if pattern in PATTERNS:
        return PATTERNS[pattern]
    if re.fullmatch(r"[\w.-]+", pattern):  # a name, not an expression
        message = f"no pattern is called {pattern!r}"
        fix = f"use {names}, or give a regex"
        raise MaxlmError(message, where=error_location, fix=fix)
    try:
        Regex(pattern)
    except Exception as error:  # The library raises bare Exception.
        message = f"the pattern is no regular expression ({error})"
        fix = f"write it as tiktoken's pat_str, or use {names}"
        raise MaxlmError(message, where=error_location, fix=fix) from error
    return pattern


def _parse_ranks(data: bytes, error_location: str) -> dict[bytes, int]:
    lines = [line for line in data.splitlines() if line]
    try:
        ranks: dict[bytes, int] = {}
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        if not len(lines) == len(ranks) == len({*ranks.values()}):
            raise ValueError("a token or a rank comes twice")
        if any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError("not every byte has a rank")
    except ValueError as error:
        message = f"damaged rank file ({error})"
        fix = "copy the .tiktoken file again"
        raise MaxlmError(message, where=error_location, fix=fix) from error
    return ranks


def _number_special_tokens(
    id_by_literal: Mapping[str, int | None],
    vocab: Mapping[str, int],
    error_location: str,
) -> dict[str, int]:
    """Gives an id to the special tokens that have none, after those that are taken."""
    special: dict[str, int] = {}
    literal_by_id = {token_id: literal for literal, token_id in vocab.items()}
    # Those with an id first, so that no other gets it.
    entries = sorted(id_by_literal.items(), key=lambda item: item[1] is None)
    for literal, token_id in entries:
        if literal in vocab:
            message = f"{literal!r} is an ordinary token of this file"
            fix = (
                "name another literal (--special, --eos, --bos, --pad of `tokenizer "
                "import`)"
            )
            raise MaxlmError(message, where=error_location, fix=fix)
        free_id = max(literal_by_id) + 1
        if token_id is None:
            token_id = free_id
        if token_id in literal_by_id:
            other = literal_by_id[token_id]
            message = f"the id {token_id} of {literal!r} is that of {other!r}"
            fix = f"give it another, or none: the first free one is {free_id}"
            raise MaxlmError(message, where=error_location, fix=fix)
        literal_by_id[token_id] = literal
        special[literal] = token_id
    return special


def _split_by_ranks(
    token: bytes, ranks: Mapping[bytes, int], limit: int
) -> list[bytes]:
    """Splits a token into the parts that merges of ranks below ``limit`` make of its
    bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    pair_ranks = [ranks.get(token[i : i + 2], limit) for i in range(len(token) - 1)]
    while pair_ranks and min(pair_ranks) < limit:
        i = pair_ranks.index(min(pair_ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        # The new part makes new pairs with its neighbours.
        del pair_ranks[i]
        if i < len(pair_ranks):
            pair_ranks[i] = ranks.get(parts[i] + parts[i + 1], limit)
        if i > 0:
            pair_ranks[i - 1] = ranks.get(parts[i - 1] + parts[i], limit)
    return parts
