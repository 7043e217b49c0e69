"""How byte-level BPE tokenizers split a text before merges, by the names that GGUF
files have for it (``tokenizer.ggml.pre``; llama.cpp's src/llama-vocab.cpp lists them).

Patterns are those of the published tokenizer.json. No merge crosses a border of theirs;
of a list, each splits further what the one before it left.
"""

from dataclasses import dataclass, field
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_CASE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASE_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_BY_CASE[0]}|{_BY_CASE[1]}|\p{{N}}|{_CASE_REST}"
_GPT4O = (
    rf"{_BY_CASE[0]}{_CONTRACTIONS}?|{_BY_CASE[1]}{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_CASE_REST}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}",
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _split(*patterns: str) -> list[dict[str, Any]]:
    return [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in patterns
    ]


def _byte_level(*, splits: bool) -> dict[str, Any]:
    """The step that writes bytes as characters, after it has split by GPT-2's pattern
    or not."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": splits,
    }


_GPT2_STEPS = [_byte_level(splits=True)]
_DIGITS = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class PreTokenizer:
    """A way to split text."""

    names: tuple[str, ...]
    """Its names in ``tokenizer.ggml.pre``; the first is written."""
    steps: list[dict[str, Any]]
    """Steps of tokenizer.json's ``pre_tokenizer``."""
    ignores_merges: bool = False
    """Whether a piece that is a token is not split, whatever merges say."""
    adds_bos: bool = False
    """Whether documents open with bos where the file does not say."""
    normalizer: dict[str, Any] | None = field(default=None)
    """tokenizer.json's, which llama.cpp passes over."""

    @property
    def spec(self) -> dict[str, Any]:
        """tokenizer.json's ``pre_tokenizer``."""
        if len(self.steps) == 1:
            return self.steps[0]
        return {"type": "Sequence", "pretokenizers": self.steps}


def _by_patterns(
    names: tuple[str, ...],
    *patterns: str,
    ignores_merges: bool = False,
    adds_bos: bool = False,
    normalizer: dict[str, Any] | None = None,
) -> PreTokenizer:
    steps = [*_split(*patterns), _byte_level(splits=False)]
    return PreTokenizer(names, steps, ignores_merges, adds_bos, normalizer)


PRE_TOKENIZERS = (
    PreTokenizer(
        (
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"),
            *("gigachat", "a.x-4.0", "mellum", "exaone4", "modern-bert"),
        ),
        _GPT2_STEPS,
    ),
    PreTokenizer(
        (
            *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
            *("minerva-7b", "mellum2"),
        ),
        [_DIGITS, _byte_level(splits=True)],
    ),
    _by_patterns(
        (
            *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"),
            *("midm-2.0", "lfm2"),
        ),
        _LLAMA3,
        ignores_merges=True,
        adds_bos=True,
    ),
    _by_patterns(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _LLAMA3),
    _by_patterns(
        ("qwen2", "deepseek-r1-qwen", "kormo", "megrez"),
        _QWEN2,
        normalizer={"type": "NFC"},
    ),
    _by_patterns(("stablelm2", "hunyuan", "solar-open", "grok-2"), _QWEN2),
    _by_patterns(("qwen35",), _QWEN35, normalizer={"type": "NFC"}),
    _by_patterns(("tekken",), _TEKKEN, ignores_merges=True, adds_bos=True),
    _by_patterns(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT4O),
    _by_patterns(("deepseek-v3", "hunyuan-dense", "joyai-llm"), *_DEEPSEEK3),
    _by_patterns(("deepseek-coder",), *_DEEPSEEK_CODER),
    _by_patterns(("bloom", "poro-chat", "gpt3-finnish"), _BLOOM),
    _by_patterns(("viking",), _BLOOM, r"\p{N}"),
    PreTokenizer(
        ("falcon",),
        [
            *_split(r"[\p{P}\$\+<=>\^~\|`]+"),
            _byte_level(splits=True),
            *_split("[0-9][0-9][0-9]"),
        ],
    ),
    PreTokenizer(
        ("default",),
        [
            *_split(r"[\p{P}\$\+<=>\^~\|]+"),
            _byte_level(splits=True),
            *_split(r"\p{N}+", "[0-9][0-9][0-9]"),
        ],
    ),
)
PRE_TOKENIZER_BY_NAME = {
    name: pre_tokenizer
    for pre_tokenizer in PRE_TOKENIZERS
    for name in pre_tokenizer.names
}
