"""Problems for which the policy may run Python programs."""

from pydantic import Field

from maxlm.evaluation.sandbox import SandboxLimits, run_python
from maxlm.rl.environments.calculator import find_last_call
from maxlm.rl.environments.environment import Reply
from maxlm.rl.environments.single_turn import SingleTurnEnvironment
from maxlm.rl.samples import Sample

_OPENER = "<python>"
_CLOSER = "</python>"


class PythonToolEnvironment(SingleTurnEnvironment):
    """The policy writes a program between ``<python>`` and ``</python>``, the
    environment runs it in evaluation's sandbox and answers with what it printed, and
    the policy goes on. A turn that runs nothing is its final answer."""

    kind: str = "python_tool"
    stop_strings: tuple[str, ...] = (_CLOSER,)
    max_calls: int = Field(default=3, ge=1)
    """Programs in an episode at most; a turn follows the last."""
    reply: str = "{result}"
    """What the environment says, with the program's output in place of {result}."""
    program_seconds: float = Field(default=10.0, gt=0)
    """A program is ended after so long; no other sample waits for it."""
    memory_bytes: int = Field(default=1 << 30, gt=0)
    """Memory that a program may take."""
    max_output_chars: int = Field(default=1000, gt=0)
    """Of what it printed the last characters are kept."""

    @property
    def max_turns(self) -> int:
        return self.max_calls + 1

    def respond(self, sample: Sample) -> Reply | None:
        program = find_last_call(sample.last_answer, _OPENER, _CLOSER)
        if program is None:
            return None
        limits = SandboxLimits(
            seconds=self.program_seconds, memory_bytes=self.memory_bytes
        )
        result = run_python(program.strip("\n"), limits)
        output = result.output.strip()
        if result.status == "timed_out":
            output = f"{output}\n{result.message}".strip()
        output = output[-self.max_output_chars :]
        return Reply(self.reply.replace("{result}", output), self.reply_role)
