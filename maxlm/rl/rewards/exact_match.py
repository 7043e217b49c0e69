"""Answers that are the right one, but for how they are written."""

import re

from pydantic import field_validator

from maxlm.config import MaxlmError
from maxlm.rl.rewards.answers import (
    AnswerReward,
    check_pattern,
    list_references,
    normalize_answer,
)
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping


class ExactMatchReward(AnswerReward):
    """1 for the answer of the row, or one of its answers; 0 for others."""

    kind: str = "exact_match"
    answer: str = "answer"
    """Column of the right answer, or of a list of right ones."""
    answer_pattern: str | None = None
    """Regular expression whose last match in the column, or its first group, is the
    right answer: ``#### (.*)`` for GSM8K's."""
    numbers: bool = True
    """Whether numbers of the same value are the same: 1,000.0 and 1000."""
    ignore_case: bool = True
    """Whether letters of any case are the same."""
    ignore_spaces: bool = True
    """Whether any number of spaces are the same; those around an answer then do not
    count, nor do quotes, ``*``, ``$`` and a full stop there."""

    @field_validator("answer_pattern")
    @classmethod
    def _check_answer_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            check_pattern(pattern)
        return pattern

    def check_row(self, row: JsonMapping) -> None:
        self._list_references(row)

    def score(self, sample: Sample) -> float:
        answer = self.read_answer(sample)
        if answer is None:
            return 0.0
        normal = self._normalize(answer)
        references = self._list_references(sample.prompt.row)
        return float(any(normal == self._normalize(right) for right in references))

    def _normalize(self, text: str) -> object:
        return normalize_answer(
            text,
            numbers=self.numbers,
            case=self.ignore_case,
            spaces=self.ignore_spaces,
        )

    def _list_references(self, row: JsonMapping) -> list[str]:
        references = list_references(row, self.answer)
        if self.answer_pattern is None:
            return references
        return [self._find_answer(reference) for reference in references]

    def _find_answer(self, text: str) -> str:
        matches = list(re.finditer(self.answer_pattern or "", text))
        if not matches:
            message = f"answer_pattern matches nothing in the column {self.answer!r}"
            raise MaxlmError(message, fix="correct the pattern, or leave the row out")
        match = matches[-1]
        return match.group(1) if match.re.groups else match.group()
