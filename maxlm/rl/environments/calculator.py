"""Problems for which the policy may ask a calculator."""

from functools import partial

from pydantic import Field

from maxlm.data.loader.permutation import derive_key
from maxlm.rl.environments.arithmetic import compute_arithmetic, format_number
from maxlm.rl.environments.environment import (
    GeneratedRows,
    PromptRows,
    Reply,
)
from maxlm.rl.environments.single_turn import SingleTurnEnvironment
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping, JsonObject

_OPENER = "<calc>"
_CLOSER = "</calc>"


class CalculatorEnvironment(SingleTurnEnvironment):
    """The policy writes ``<calc>12*7</calc>``, the environment answers with the result,
    and the policy goes on. A turn that calls nothing is its final answer.

    Prompts come from ``files``, or are products that are drawn: ``12*7=`` with the
    answer ``84``.
    """

    needs_files = False
    replies_at_once = True

    kind: str = "calculator"
    stop_strings: tuple[str, ...] = (_CLOSER,)
    max_calls: int = Field(default=1, ge=1)
    """Calls in an episode at most; a turn follows the last."""
    reply: str = "{result}"
    """What the environment says, with the result in place of {result}."""
    num_digits: int = Field(default=2, ge=1, le=18)
    """Digits at most of each factor that is drawn."""
    template: str = "{a}*{b}="
    """The prompt that is drawn, with the factors in place of {a} and {b}."""

    @property
    def max_turns(self) -> int:
        return self.max_calls + 1

    def open_prompts(self, seed: int) -> PromptRows:
        if self.files:
            return super().open_prompts(seed)
        make_row = partial(self.make_row, seed)
        return GeneratedRows(make_row, "environment.kind=calculator")

    def make_row(self, seed: int, row_number: int) -> JsonObject:
        """Returns a product, which follows from the seed and the number of its row
        alone."""
        limit = 10**self.num_digits
        a = derive_key(seed, "calculator", row_number, "a") % limit
        b = derive_key(seed, "calculator", row_number, "b") % limit
        prompt = self.template.replace("{a}", str(a)).replace("{b}", str(b))
        return {"prompt": prompt, "answer": str(a * b), "a": a, "b": b}

    def write_example(self, row: JsonMapping) -> str:
        """Returns a call of a drawn product, the reply and the answer; of a row of
        files, the answer alone."""
        answer = super().write_example(row)
        if self.files:
            return answer
        expression = f"{row['a']}*{row['b']}"
        reply = self.reply.replace("{result}", _work_out(expression))
        return f"{_OPENER}{expression}{_CLOSER}{reply}{answer}"

    def respond(self, sample: Sample) -> Reply | None:
        expression = find_last_call(sample.last_answer, _OPENER, _CLOSER)
        if expression is None:
            return None
        reply = self.reply.replace("{result}", _work_out(expression))
        return Reply(reply, self.reply_role)


def _work_out(expression: str) -> str:
    """The calculator's result, or what is wrong with the expression."""
    try:
        return format_number(compute_arithmetic(expression))
    except ValueError as error:
        return f"error: {error}"


def find_last_call(turn: str, opener: str, closer: str) -> str | None:
    """Returns what stands in the call that a turn ends with; None: it ends otherwise.
    Only spaces may follow."""
    turn = turn.rstrip()
    start = turn.rfind(opener)
    if start < 0 or not turn.endswith(closer):
        return None
    return turn[start + len(opener) : -len(closer)]
