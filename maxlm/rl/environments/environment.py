"""What an environment is: rows that prompts are made of, and answers to turns."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.data.conversations import read_template_variables
from maxlm.data.tokenizer.chat import Message, encode_chat
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.rl.samples import Sample
from maxlm.runtime.json_types import JsonMapping, JsonObject

ReplyRole = Literal["tool", "user"]


@dataclass(frozen=True)
class Reply:
    """An environment's answer to a turn of the policy, which then has another turn."""

    text: str
    role: ReplyRole = "tool"
    """Whose message it is, for the chat template."""


class PromptRows(Protocol):
    """Rows by number, each a prompt and what rewards read."""

    @property
    def num_rows(self) -> int | None:
        """Rows there are; None: any number."""
        ...

    def __getitem__(self, row_number: int, /) -> JsonObject:
        """Returns a row, which has a ``prompt``: text or a list of messages. The same
        number gives the same row, in every process."""
        ...

    def locate(self, row_number: int, /) -> str:
        """Returns where a row is, for messages."""
        ...


@dataclass(frozen=True)
class GeneratedRows:
    """Rows that a pure function of their number makes."""

    make_row: Callable[[int], JsonObject]
    name: str
    """Of what makes them, for messages."""
    num_rows: int | None = None

    def __getitem__(self, row_number: int, /) -> JsonObject:
        return self.make_row(row_number)

    def locate(self, row_number: int, /) -> str:
        return f"{self.name}: row {row_number}"


class Environment(Config):
    """Makes prompts, and answers the policy's turns until an episode ends.

    It has no state of its own: what it answers follows from a sample's row and turns
    alone. So an episode goes on after a restart as if nothing had happened.
    """

    replies_at_once: ClassVar[bool] = False
    """Whether :meth:`respond` takes no time and always says the same: then it is called
    between two steps of the engine, else in a thread beside them."""

    needs_files: ClassVar[bool] = False
    """Whether prompts come of ``files`` alone."""

    kind: str = "single_turn"
    chat: bool = False
    """true: a prompt of text is a user's message, which the tokenizer's chat template
    writes; false: text is continued as it is. Prompts of messages are always a chat."""
    system: str = ""
    """What the system says before a prompt of text that is a chat."""
    template_variables: Mapping[str, Any] = Field(default_factory=dict)
    """Variables of the chat template: {enable_thinking: false}. A row's
    ``chat_template_kwargs`` come before them."""
    rewritten_turns: Literal["refuse", "keep_drawn"] = "refuse"
    """Of a chat template that writes earlier turns otherwise than the policy drew them,
    such as without their thinking, and an environment of several turns. ``refuse``:
    training does not start. ``keep_drawn``: the policy goes on from the tokens that it
    drew, and so from others than a server sends it."""
    reply_role: ReplyRole = "tool"
    """Whose message the environment's answer is, for the chat template."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a turn of the policy, such as the end of a call; they stay in
    it."""

    def check_files(self, setting: str, example: str) -> None:
        """Checks that files of prompts are named where they are needed, and are there;
        reads none. Raises MaxlmError.

        Args:
            setting: the one that names them, for messages.
            example: how a user names them: ``--prompts FILE``.
        """

    @abstractmethod
    def open_prompts(self, seed: int) -> PromptRows:
        """Opens the rows of prompts. Raises MaxlmError: they cannot be read.

        Args:
            seed: of the run, for rows that are drawn.
        """

    def respond(self, sample: Sample) -> Reply | None:
        """Answers a sample's last turn, which is the policy's and which it ended
        itself; None: the episode is over. Called in a thread unless
        ``replies_at_once``; must not change the sample."""
        return None

    def score(self, sample: Sample) -> float | None:
        """Returns the environment's own reward of an episode that is over; None: it has
        none. A pure function of the sample."""
        return None

    def write_example(self, row: JsonMapping) -> str:
        """Returns what a policy that knows how writes behind a row's prompt of text,
        with the environment's replies where they stand: to tune a model on. Raises
        MaxlmError: there is no example of such a row."""
        answer = row.get("answer")
        if not isinstance(answer, str):
            message = f"environment.kind={self.kind} has no example: a row has no text "
            message += "'answer'"
            fix = "use kind=addition or kind=calculator, or write the column yourself"
            raise MaxlmError(message, where="examples", fix=fix)
        return answer

    def write_flawed_example(self, row: JsonMapping, draw: int) -> str:
        """Returns what a policy that does not know how writes, drawn by ``draw``, a
        64-bit number: by default the answer alone, as one who guesses well would.
        Raises MaxlmError: see :meth:`write_example`."""
        return Environment.write_example(self, row)

    @property
    def max_turns(self) -> int:
        """Turns of the policy at most in an episode; 1: :meth:`respond` is never
        called."""
        return 1

    def make_messages(self, row: JsonMapping) -> list[Message] | None:
        """Returns a row's prompt as the messages of a chat; None: it is text to be
        continued as it is. Raises MaxlmError: it is neither."""
        prompt = row.get("prompt")
        if prompt is None and isinstance(row.get("messages"), list):
            prompt = _drop_last_answer(row["messages"])
        if isinstance(prompt, str):
            if not self.chat:
                return None
            system = {"role": "system", "content": self.system}
            user = {"role": "user", "content": prompt}
            return [system, user] if self.system else [user]
        if not isinstance(prompt, list) or not prompt:
            columns = ", ".join(map(repr, row)) or "none"
            message = f"the prompt is neither text nor messages: there are {columns}"
            fix = "name its column in environment.columns: {prompt: ...}"
            raise MaxlmError(message, where="prompt", fix=fix)
        last_role = prompt[-1].get("role") if isinstance(prompt[-1], dict) else None
        if last_role == "assistant":
            message = "the prompt ends with the assistant's message, which is to come"
            raise MaxlmError(message, where="prompt", fix="leave that message out")
        return prompt

    def read_template_variables(self, row: JsonMapping) -> dict[str, Any]:
        """Returns what a row and the settings say to the chat template."""
        return {**self.template_variables, **read_template_variables(row)}

    def encode_prompt(self, tokenizer: Tokenizer, row: JsonMapping) -> list[int]:
        """Returns the tokens that the policy reads first. Raises MaxlmError: a row
        without a prompt, a tokenizer without a chat template for messages."""
        messages = self.make_messages(row)
        if messages is None:
            return [*tokenizer.prefix_ids, *tokenizer.encode(row["prompt"])]
        variables = self.read_template_variables(row)
        return encode_chat(
            tokenizer, messages, **{**variables, "add_generation_prompt": True}
        )


def _drop_last_answer(messages: list[Any]) -> list[Any]:
    """A conversation without the assistant's message that it ends with, if it does."""
    last = messages[-1] if messages else None
    is_answer = isinstance(last, dict) and last.get("role") == "assistant"
    return messages[:-1] if is_answer else messages
