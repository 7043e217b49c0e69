"""Sums of numbers with so many digits."""

from functools import partial

from pydantic import Field

from maxlm.data.loader.permutation import derive_key
from maxlm.rl.environments.environment import Environment, GeneratedRows, PromptRows
from maxlm.runtime.json_types import JsonMapping, JsonObject

_ERRORS = (-11, -10, -9, -1, 1, 9, 10, 11)
"""What :meth:`AdditionEnvironment.write_flawed_example` adds to a sum."""


class AdditionEnvironment(Environment):
    """Sums that are drawn: the prompt ``12+34=`` with the answer ``46``, in columns
    ``prompt`` and ``answer``; ``a`` and ``b`` are the numbers."""

    kind: str = "addition"
    num_digits: int = Field(default=2, ge=1, le=18)
    """Digits of each number at most: 2 draws from 0 to 99."""
    template: str = "{a}+{b}="
    """The prompt, with the numbers in place of {a} and {b}."""
    pad: bool = False
    """Whether numbers have zeros in front, ``07+41=`` and ``048``, so that digits of
    one weight stand in one place."""
    reverse: bool = False
    """Whether the answer's digits are written from the last to the first: each then
    follows from two digits and a carry, which small models learn with fewer sums (Lee
    et al. 2023, arXiv 2307.03381)."""
    num_rows: int | None = Field(default=None, gt=0)
    """Sums there are, drawn once; null: never the same row again."""

    def open_prompts(self, seed: int) -> PromptRows:
        make_row = partial(self.make_row, seed)
        return GeneratedRows(make_row, "environment.kind=addition", self.num_rows)

    def make_row(self, seed: int, row_number: int) -> JsonObject:
        """Returns a sum, which follows from the seed and the number of its row
        alone."""
        limit = 10**self.num_digits
        # Keys have 64 bits: at 18 digits some numbers are 5% likelier than others.
        a = derive_key(seed, "addition", row_number, "a") % limit
        b = derive_key(seed, "addition", row_number, "b") % limit
        prompt = self.template.replace("{a}", self._write(a, self.num_digits))
        prompt = prompt.replace("{b}", self._write(b, self.num_digits))
        return {"prompt": prompt, "answer": self._write_answer(a + b), "a": a, "b": b}

    def write_flawed_example(self, row: JsonMapping, draw: int) -> str:
        """Returns a sum that is one too much or too little in the units, the tens or
        both."""
        errors = [error for error in _ERRORS if row["a"] + row["b"] + error >= 0]
        return self._write_answer(row["a"] + row["b"] + errors[draw % len(errors)])

    def _write_answer(self, number: int) -> str:
        answer = self._write(number, self.num_digits + 1)
        return answer[::-1] if self.reverse else answer

    def _write(self, number: int, num_digits: int) -> str:
        return f"{number:0{num_digits}}" if self.pad else str(number)
