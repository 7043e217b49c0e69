"""Supervised fine-tuning: the cross-entropy of answers."""

from typing import ClassVar, Literal

from pydantic import Field

from maxlm.data.conversations import (
    EncodedSequence,
    Turns,
    encode_answer,
    encode_conversation,
    get_column,
    read_template_variables,
)
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.tasks.rows import FileRow, RowTask
from maxlm.tasks.text import TokenPredictionTask


class AnswerTask(RowTask):
    """A task on the answers in rows of messages, or of prompts and completions."""

    examples_per_row: int | None = Field(default=None, ge=1)
    turns: Turns = "all"
    """Turns that are learnt: all of ``roles``, or the last alone."""
    roles: tuple[str, ...] = ("assistant",)
    """Roles whose turns are learnt."""
    learn_prompt: bool = False
    """Learn every token, of prompts and other roles too."""

    def encode_example(
        self, tokenizer: Tokenizer, row: FileRow
    ) -> list[EncodedSequence]:
        variables = read_template_variables(row)
        if "messages" in row:
            encoded = encode_conversation(
                tokenizer,
                row["messages"],
                turns=self.turns,
                roles=self.roles,
                variables=variables,
            )
        else:
            prompt = get_column(row, "prompt")
            completion = get_column(row, "completion")
            encoded = encode_answer(tokenizer, prompt, completion, variables)
        if self.learn_prompt:
            encoded = encoded._replace(is_target=[True] * len(encoded.tokens))
        return [encoded]


class SftTask(AnswerTask, TokenPredictionTask):
    """Learns to answer: cross-entropy of the answers in rows of messages, or of prompts
    and completions; a token counts alike wherever it stands in a batch."""

    reads_frontend: ClassVar[bool] = True

    kind: Literal["sft"] = "sft"
