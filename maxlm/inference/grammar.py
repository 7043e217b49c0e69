"""Structured output: which tokens may come next so that the output has the form asked
for.

`llguidance` (extra ``serve``) compiles the forms and makes the masks.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.json_schema import make_compilable_schema
from maxlm.inference.requests import GrammarSpec

# Forms that are kept compiled: requests of one program mostly ask for the same.
_CACHED = 64
# A blank, or a line's end with indentation: a model may write any number of blanks, and
# never end.
_JSON_OPTIONS: Any = {"whitespace_pattern": r" |\r?\n[ \t]{0,24}"}


class GrammarCompiler:
    """Compiles forms of output for the tokens of one tokenizer. Raises MaxlmError where
    llguidance is not installed."""

    def __init__(self, tokenizer: Tokenizer):
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            message = f"structured output needs the module {error.name}"
            raise MaxlmError(message, fix="pip install 'maxlm[serve]'") from error
        vocabulary: Any = TokenizerWrapper(_Vocabulary(tokenizer))
        self._tokens = LLTokenizer(vocabulary, eos_token=[*tokenizer.stop_ids])
        self._stop_ids = tokenizer.stop_ids
        self._prototype = lru_cache(_CACHED)(self._compile)

    def compile(self, spec: GrammarSpec) -> "GrammarMatcher":
        """Return a matcher at the beginning of an output. Raises MaxlmError: the
        schema, expression or grammar is wrong, asks for what llguidance does not
        support, or allows no text of this tokenizer."""
        return self._prototype(spec).copy()

    def _compile(self, spec: GrammarSpec) -> "GrammarMatcher":
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, _translate_spec(spec), log_level=0)
        if matcher.is_error():
            raise _make_error(spec, _shorten(matcher.get_error()))
        matcher = GrammarMatcher(matcher, self._stop_ids)
        matcher.fill_mask(np.zeros(-(-self._tokens.vocab_size // 32), np.uint32))
        if matcher.error:
            raise _make_error(spec, "no text of this tokenizer has that form")
        return matcher


class GrammarMatcher:
    """Follows one output, and says which tokens may come next.

    Masks are uint32 [words], token v in bit v % 32 of word v // 32, as
    ``compute_sampling_logits`` takes them; words beyond the tokenizer's ids are 0.
    """

    def __init__(self, matcher: Any, stop_ids: Sequence[int]):
        self._matcher = matcher
        self._stop_ids = stop_ids

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete and nothing but an end-of-text token may
        follow, or ``error`` is set."""
        return self.error is not None or self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the output can neither go on nor end in its form, or None: the form grew
        too complex, or the tokenizer has no token for what must come."""
        if not self._matcher.is_error():
            return None
        reason = _shorten(self._matcher.get_error())
        return "no token can come next" if reason == "NoExtensionBias" else reason

    def fill_mask(self, row: NDArray[np.uint32]) -> None:
        """Write the mask of the tokens that may come next: end-of-text tokens once the
        output is complete, and if there is an ``error``."""
        row[:] = 0
        if self.error is None:
            mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(row)]
            row[: len(mask)] = mask
        if self.error is not None:  # it may come up here
            for i in self._stop_ids:
                row[i // 32] |= np.uint32(1 << i % 32)

    def accept(self, token: int) -> bool:
        """Go on by a token; return whether it may come here. If not, or if the output
        is finished, the matcher stays."""
        return self.error is None and self._matcher.try_consume_tokens([token]) == 1

    def copy(self) -> "GrammarMatcher":
        """Return a matcher at the same place that goes on by itself."""
        return GrammarMatcher(self._matcher.deep_copy(), self._stop_ids)


class _Vocabulary:
    """A tokenizer as llguidance's ``TokenizerWrapper`` reads it."""

    def __init__(self, tokenizer: Tokenizer):
        special = {*tokenizer.special_tokens.values(), *tokenizer.codec.unknown_ids}
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = tokenizer.codec.token_bytes
        self.special_token_ids = sorted(special)
        self._tokenizer = tokenizer
        self._ids = {
            text: i for i, text in enumerate(self.tokens) if text and i not in special
        }
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text within another: they are what is allowed where only one
        text may come. Some tokenizers put a space before what they encode, or change
        it."""
        ids = self._tokenizer.encode(text)
        if b"".join(self.tokens[i] for i in ids) == text:
            return ids
        return self._match_longest(text)

    def _match_longest(self, text: bytes) -> list[int]:
        ids = []
        while text:
            prefix = self._find_longest_prefix(text)
            if prefix is None:
                break
            ids.append(self._ids[prefix])
            text = text[len(prefix) :]
        return ids

    def _find_longest_prefix(self, text: bytes) -> bytes | None:
        """The longest beginning of a text that is a token's."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[:size] in self._ids:
                return text[:size]
        return None


def _translate_spec(spec: GrammarSpec) -> str:
    """The form in llguidance's own notation."""
    from llguidance import LLMatcher

    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.text)
    if spec.kind == "lark":
        return LLMatcher.grammar_from_lark(spec.text)
    text = spec.text if spec.kind == "json_schema" else '{"type": "object"}'
    try:
        schema = json.loads(text)  # its errors name a place in the text given
        if not isinstance(schema, dict):
            raise _make_error(spec, "a schema is a JSON object")
        compilable = json.dumps(make_compilable_schema(schema).schema)
        return LLMatcher.grammar_from_json_schema(compilable, defaults=_JSON_OPTIONS)
    except (ValueError, RecursionError) as error:
        raise _make_error(spec, _shorten(str(error))) from error


def _make_error(spec: GrammarSpec, reason: str) -> MaxlmError:
    # llguidance names a setting of its own here, which whoever writes the schema cannot
    # reach.
    if reason.startswith("oneOf"):
        reason = "oneOf whose members may match together is not supported: use anyOf"
    return MaxlmError(f"{spec.kind} cannot be compiled: {reason}", where=spec.asked_by)


def _shorten(message: str) -> str:
    """The line of a message that names the mistake."""
    lines = [line.strip() for line in message.splitlines()]
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return lines[0] if lines else ""
