"""The answer in what a policy says, and when two answers are the same."""

import re
import unicodedata
from decimal import Decimal
from typing import Literal

from pydantic import model_validator

from maxlm.config import MaxlmError
from maxlm.rl.rewards.reward import Reward, Worker, require_column
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping

Extraction = Literal["tags", "boxed", "last_number", "code_block", "regex", "whole"]
# Thousands are separated all through or not at all: 1,2 is not 12.
_NUMBER = re.compile(
    r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?"
)
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.])[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
)
# What surrounds an answer without being a part of it.
_WRAPPING = " \t\n*`\"'$"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


class AnswerReward(Reward):
    """A reward that reads the answer in the policy's last turn, and nothing of the
    prompt or of an environment's turns: where these hold the answer, no one has given
    it."""

    extract: Extraction = "tags"
    """What of the text is the answer: what stands in the last pair of tags
    ``<answer>...</answer>``; in the last ``\\boxed{...}``; the last number; the last
    fenced block of code; the last match of ``pattern``; or all of it. An answer that
    is not there, is empty or not ended is wrong."""
    tag: str = "answer"
    """Name of the tags."""
    pattern: str | None = None
    """Regular expression of ``extract: regex``; its first group, if it has one, is the
    answer."""
    after: str | None = None
    """Text behind whose last occurrence the answer stands, such as ``</think>``;
    without it there is none. null: anywhere."""

    @model_validator(mode="after")
    def _check_pattern(self) -> "AnswerReward":
        if (self.extract == "regex") != (self.pattern is not None):
            message = f"extract={self.extract} with pattern={self.pattern}"
            fix = "set both extract: regex and pattern, or neither"
            raise MaxlmError(message, where="pattern", fix=fix)
        if self.pattern is not None:
            check_pattern(self.pattern)
        return self

    @property
    def worker(self) -> Worker:
        # A regular expression can take forever on a text.
        return "caller" if self.pattern is None else "process"

    def read_answer(self, sample: Sample) -> str | None:
        """Returns the answer, without spaces around it; None: there is none."""
        text = sample.last_answer
        if self.after is not None:
            if self.after not in text:
                return None
            text = text.rpartition(self.after)[2]
        answer = extract_answer(text, self.extract, self.tag, self.pattern)
        if answer is None:
            return None
        return answer.strip() or None


def check_pattern(pattern: str) -> None:
    """Raises MaxlmError: no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        message = f"no regular expression: {error}"
        raise MaxlmError(message, where="pattern", fix="correct it") from None


def extract_answer(
    text: str, extraction: Extraction, tag: str = "answer", pattern: str | None = None
) -> str | None:
    """Returns the last answer in a text; None: there is none, or it is not ended."""
    if extraction == "tags":
        return _read_last_tags(text, tag)
    if extraction == "boxed":
        return read_last_box(text)
    if extraction == "last_number":
        numbers = _NUMBER_IN_TEXT.findall(text)
        return numbers[-1] if numbers else None
    if extraction == "code_block":
        blocks = _BLOCK.findall(text)
        return blocks[-1] if blocks else None
    if extraction == "regex":
        matches = list(re.finditer(pattern or "", text, re.DOTALL))
        if not matches:
            return None
        match = matches[-1]
        return match.group(1) if match.re.groups else match.group()
    return text


def _read_last_tags(text: str, tag: str) -> str | None:
    opening = f"<{tag}>"
    closing = f"</{tag}>"
    if opening not in text:
        return None
    answer, end, _ = text.rpartition(opening)[2].partition(closing)
    return answer if end else None


def read_last_box(text: str) -> str | None:
    """Returns what the last ``\\boxed{...}`` of a text holds; None: there is none, or
    it is not closed. A box in a box is a part of the outer one."""
    content = None
    place = 0
    while True:
        box = _BOX.search(text, place)
        if box is None:
            return content
        end = _find_closing_brace(text, box.end())
        if end is None:
            return None
        content = text[box.end() : end]
        place = end


def _find_closing_brace(text: str, start: int) -> int | None:
    depth = 1
    place = start
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 1  # whatever is behind it is no brace of a group
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return place
        place += 1
    return None


def parse_number(text: str) -> Decimal | None:
    """Returns the number that a whole text is, of ASCII digits; None: it is none."""
    mantissa = text.lower().partition("e")[0]
    has_digits = any("0" <= character <= "9" for character in mantissa)
    if not has_digits or not _NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))


def normalize_answer(
    text: str, *, numbers: bool = True, case: bool = True, spaces: bool = True
) -> str | Decimal:
    """Returns what two equal answers have in common.

    Args:
        numbers: 1,000.0 and +1000 are the same, as a Decimal.
        case: letters of any case are.
        spaces: any number of spaces are, none at the ends, nor marks of emphasis,
            quotes, dollar signs and a full stop.
    """
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    if spaces:
        plain = " ".join(plain.split())
        plain = plain.strip(_WRAPPING).removesuffix(".").strip(_WRAPPING) or plain
    if numbers:
        number = parse_number(plain.strip())
        if number is not None:
            return number
    return plain.casefold() if case else plain


def list_references(row: JsonMapping, column: str) -> list[str]:
    """Returns the right answers that a row names: one, or a list of them."""
    value = require_column(row, column, "answer")
    values = value if isinstance(value, list | tuple) else [value]
    references = [str(reference) for reference in values]
    if not references or not all(reference.strip() for reference in references):
        message = f"the column {column!r} is empty"
        raise MaxlmError(message, fix="leave the row out, or give its answer")
    return references
