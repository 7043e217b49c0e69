"""Mathematical answers, compared by what they mean (math-verify)."""

import importlib
import logging
import re
from typing import Any

from maxlm.rl.rewards.answers import (
    AnswerReward,
    Extraction,
    list_references,
    normalize_answer,
    read_last_box,
)
from maxlm.rl.rewards.reward import Scorer, Worker, require_package
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping

# math-verify compares to six decimals, so that all tiny numbers are the same to it.
_MAX_RELATIVE_DIFFERENCE = 1e-6
_ELLIPSIS = re.compile(r"\\[cl]?dots|\.\.\.|…")
# An operation on two numbers, or one that is written as a function.
_ARITHMETIC = re.compile(
    r"[0-9)}]\s*(?:[-+*/^×÷]|\\cdot|\\times|\\div)\s*[-\\({]*\s*[0-9(]"
    r"|[0-9]\s*\(\s*[0-9]|\\(?:[dt]?frac|sqrt|d?binom|sum|prod|log|ln)|[0-9)}]\s*!"
)
_SCIENTIFIC = re.compile(
    r"[-+]?[0-9.,]+\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?\s*[-+]?[0-9]+\s*\}?"
)
_FRACTION = re.compile(
    r"[-+]?\s*(?:\\[dt]?frac\s*(?:\{[0-9]+\}|[0-9])\s*(?:\{[0-9]+\}|[0-9])"
    r"|[0-9]+\s*/\s*[0-9]+)"
)


class MathReward(AnswerReward):
    """1 for an answer that means what the row's does: 1/2 and ``\\frac{1}{2}``; 0 for
    others.

    math-verify's own time limits work in a main thread alone, and score 0 in others;
    they are off here, and the process that compares is killed when it takes too long.
    """

    kind: str = "math"
    extract: Extraction = "boxed"
    answer: str = "answer"
    """Column of the right answer, or of a list of right ones."""
    allow_arithmetic: bool = False
    """Whether 2 + 3 is an answer where 5 is right: then the question, copied, can be an
    answer to itself."""

    @property
    def worker(self) -> Worker:
        return "process"

    def check_setup(self) -> None:
        require_package("math_verify", "math-verify", self.kind)

    def check_row(self, row: JsonMapping) -> None:
        list_references(row, self.answer)

    def open(self) -> Scorer:
        # Of each answer that it cannot read it says so, with a traceback.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL + 1)
        # Loaded now, for the time limit is that of one score.
        importlib.import_module("math_verify")
        return self.score

    def score(self, sample: Sample) -> float:
        answer = self.read_answer(sample)
        if answer is None:
            return 0.0
        references = list_references(sample.prompt.row, self.answer)
        return float(
            any(
                is_same_answer(right, answer, self.allow_arithmetic)
                for right in references
            )
        )


def is_same_answer(right: str, answer: str, allow_arithmetic: bool = False) -> bool:
    """Tells whether an answer means what the right one does. It can take forever."""
    right = _unwrap(right)
    answer = _unwrap(answer)
    normal_answer = normalize_answer(answer)
    normal_right = normalize_answer(right)
    if normal_answer == normal_right:
        return True
    if not answer or _ELLIPSIS.search(right) or _ELLIPSIS.search(answer):
        return False  # of a series math-verify reads the first terms alone
    is_number = not isinstance(normal_right, str)
    if is_number and not isinstance(normal_answer, str):
        return False  # both are numbers, and not the same
    if is_number and not allow_arithmetic:
        is_integer = normal_right == int(normal_right)
        if not _is_written_out(answer, allow_fraction=not is_integer):
            return False
    return _verify(right, answer)


def _unwrap(text: str) -> str:
    """An answer without what emphasises it: a box, dollar signs, bold type."""
    box = read_last_box(text)
    text = text if box is None else box
    text = text.strip(" \t\n*`\"'$").removesuffix(".")
    return text.replace("\\%", "%").replace("\\$", "").strip()


def _is_written_out(text: str, allow_fraction: bool) -> bool:
    if not _ARITHMETIC.search(text) or _SCIENTIFIC.fullmatch(text):
        return True
    return allow_fraction and _FRACTION.fullmatch(text) is not None


def _verify(right: str, answer: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    forms = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    expressions = []
    for text in (right, answer):
        parsed = parse(f"\\boxed{{{text}}}", extraction_config=forms, parsing_timeout=0)
        # What it cannot read it gives back as text, of which a part may be lost.
        understood = [part for part in parsed if not isinstance(part, str)]
        if not understood:
            return False
        expressions.append(understood[0])
    if not verify(*expressions, timeout_seconds=0):
        return False
    return not _differ_relatively(*expressions)


def _differ_relatively(right: Any, answer: Any) -> bool:
    """Whether two are numbers that differ by more than what rounding explains."""
    are_numbers = [getattr(part, "is_number", False) for part in (right, answer)]
    if not all(are_numbers) or right == answer:
        return False
    difference = abs(right - answer)
    limit = _MAX_RELATIVE_DIFFERENCE * max(abs(right), abs(answer))
    return bool(difference.evalf() > limit.evalf())
