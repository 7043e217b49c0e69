"""Sums of numbers with so many digits."""

from functools import partial

from pydantic import Field

from maxlm.data.loader.permutation import derive_key
from maxlm.rl.environments.environment import Environment, GeneratedRows, PromptRows
from maxlm.runtime.json_types import JsonObject


class AdditionEnvironment(Environment):
    """Sums that are drawn: the prompt ``12+34=`` with the answer ``46``, in columns
    ``prompt`` and ``answer``; ``a`` and ``b`` are the numbers."""

    kind: str = "addition"
    num_digits: int = Field(default=2, ge=1, le=18)
    """Digits of each number at most: 2 draws from 0 to 99."""
    template: str = "{a}+{b}="
    """The prompt, with the numbers in place of {a} and {b}."""
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
        prompt = self.template.replace("{a}", str(a)).replace("{b}", str(b))
        return {"prompt": prompt, "answer": str(a + b), "a": a, "b": b}
