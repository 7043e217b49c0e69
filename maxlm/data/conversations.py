"""Conversations, prompts and answers as token ids, each with whether the model learns
to write it.

Rows of files have one of these forms, the values of ``prompt``, ``completion``,
``chosen`` and ``rejected`` being text or lists of messages, {"role": ..., "content":
...}:

- ``messages``: a conversation.
- ``prompt``, ``completion``: a prompt and an answer to it.
- ``prompt``, ``chosen``, ``rejected``: two answers, of which one is better; with
  messages the prompt may be left out: it is what both begin with.
- ``prompt``, ``completion``, ``label``: an answer and whether it is good: true or
  false.

Beside messages a row may have ``tools``, the functions that the model may call, and
``chat_template_kwargs``, variables of the chat template; both also as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.chat import check_tools_are_written, encode_chat_turns
from maxlm.data.tokenizer.codec import Tokenizer

Turns = Literal["all", "last"]
Row = Mapping[str, Any]
TextOrMessages = str | list[Mapping[str, Any]]
_OPENING_ROLES = ("system", "developer")
# Keys of a message that may say something where its content does not.
_OTHER_CONTENT = ("tool_calls", "reasoning_content", "thinking", "reasoning")
# What the encoding of a row sets itself, and what transformers' apply_chat_template
# takes that is no variable of a template.
_RESERVED_VARIABLES = {
    "messages",
    "conversation",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_assistant_tokens_mask",
}


class EncodedSequence(NamedTuple):
    """Token ids, and whether each is one that the model learns to write."""

    tokens: list[int]
    is_target: list[bool]

    @property
    def num_targets(self) -> int:
        return sum(self.is_target)


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    turns: Turns = "all",
    roles: Sequence[str] = ("assistant",),
    num_prompt_messages: int = 0,
    variables: Mapping[str, Any] | None = None,
    allow_empty: bool = False,
) -> EncodedSequence:
    """Encodes a conversation by the tokenizer's chat template; see
    ``encode_chat_turns`` for which tokens of a turn are learnt. A message with
    ``"train": false`` is not learnt. Raises MaxlmError: no turn to learn or an empty
    one, roles out of order, a template that drops or rewrites turns, tools or calls.

    Args:
        turns: which turns of ``roles`` are learnt.
        num_prompt_messages: messages at the beginning that are not learnt.
        variables: of the template, as :func:`read_template_variables` returns them.
        allow_empty: whether a turn to learn may be empty.
    """
    variables = variables or {}
    _check_messages(messages)
    learnt = []
    for i, message in enumerate(messages):
        # Parquet fills in null where a message does not say, which is not False.
        may_be_learnt = message.get("train") is not False
        if i >= num_prompt_messages and message["role"] in roles and may_be_learnt:
            learnt.append(i)
    if not learnt:
        present = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        fault = f"no {' or '.join(roles)} turn to learn: the roles are {present}"
        fix = "leave the row out, or end it with an answer"
        raise MaxlmError(fault, where="messages", fix=fix)
    if turns == "last":
        learnt = learnt[-1:]
    for i in learnt:
        if _is_empty(messages[i]) and not allow_empty:
            fault = f"an empty completion: message {i} has no text"
            raise MaxlmError(fault, where="messages", fix="leave the row out")
    # Templates know no "train".
    written = [
        {key: value for key, value in message.items() if key != "train"}
        for message in messages
    ]
    check_tools_are_written(tokenizer, written, **variables)
    tokens, spans = encode_chat_turns(tokenizer, written, learnt, **variables)
    is_target = [False] * len(tokens)
    for span in spans:
        for position in span:
            is_target[position] = True
    return EncodedSequence(tokens, is_target)


def encode_answer(
    tokenizer: Tokenizer,
    prompt: TextOrMessages,
    answer: TextOrMessages,
    variables: Mapping[str, Any] | None = None,
    *,
    allow_empty: bool = False,
) -> EncodedSequence:
    """Encodes a prompt and the answer to learn: texts, which the end-of-text token
    follows, or lists of messages; raises MaxlmError if they are neither, or the answer
    is empty.

    Args:
        variables: of the template, as :func:`read_template_variables` returns them.
        allow_empty: whether the answer may be empty.
    """
    _check_text_or_messages("the prompt", prompt)
    _check_text_or_messages("the completion", answer)
    is_empty = not answer or (isinstance(answer, str) and not answer.strip())
    if is_empty and not allow_empty:
        raise MaxlmError(
            "an empty completion", where="completion", fix="leave the row out"
        )
    if isinstance(prompt, str) and isinstance(answer, str):
        if variables:
            names = " and ".join(variables)
            message = f"{names} beside a prompt and a completion of plain text"
            fix = (
                "write the prompt as messages, which the chat template writes with them"
            )
            raise MaxlmError(message, where="prompt", fix=fix)
        return _encode_text_answer(tokenizer, prompt, answer)
    # One of them is text: as messages it is the user's, or the assistant's.
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return encode_conversation(
        tokenizer,
        [*prompt, *answer],
        num_prompt_messages=len(prompt),
        variables=variables,
        allow_empty=allow_empty,
    )


def _check_text_or_messages(name: str, value: object) -> None:
    if not isinstance(value, str | list):
        kind = type(value).__name__
        message = f"{name} is of type {kind}, neither text nor a list of messages"
        raise MaxlmError(message, where=name, fix="write one of them")


def _encode_text_answer(
    tokenizer: Tokenizer, prompt: str, answer: str
) -> EncodedSequence:
    prompt_ids = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
    # As one text, unless a token crosses from the prompt into the answer: some
    # tokenizers put a space before any text, which the answer's own ids would begin
    # with.
    ids = [*tokenizer.prefix_ids, *tokenizer.encode(prompt + answer)]
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + tokenizer.encode(answer)
    num_targets = len(ids) - len(prompt_ids) + 1  # with the end-of-text token
    is_target = [False] * len(prompt_ids) + [True] * num_targets
    return EncodedSequence([*ids, tokenizer.eos_id], is_target)


def encode_pair(
    tokenizer: Tokenizer, row: Row
) -> tuple[EncodedSequence, EncodedSequence]:
    """Encodes the chosen and the rejected answer of a row, each after its prompt."""
    chosen = get_column(row, "chosen")
    rejected = get_column(row, "rejected")
    if chosen == rejected:
        raise MaxlmError(
            "chosen equals rejected", where="chosen", fix="leave the row out"
        )
    prompt = row.get("prompt")
    are_lists = isinstance(chosen, list) and isinstance(rejected, list)
    if prompt is None and not are_lists:
        prompt = get_column(row, "prompt")
    num_shared = 0
    if are_lists and not isinstance(prompt, list):
        num_shared = _count_shared_messages(chosen, rejected)
    # Some data sets say the prompt twice: as text, and as what both conversations begin
    # with.
    if num_shared or prompt is None:
        prompt = chosen[:num_shared]
        chosen = chosen[num_shared:]
        rejected = rejected[num_shared:]
    variables = read_template_variables(row)
    return (
        encode_answer(tokenizer, prompt, chosen, variables),
        encode_answer(tokenizer, prompt, rejected, variables),
    )


def _count_shared_messages(chosen: list[Any], rejected: list[Any]) -> int:
    """Counts the messages that both lists, which differ, begin with."""
    num_shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        num_shared += 1
    return num_shared


def read_template_variables(row: Row) -> dict[str, Any]:
    """Returns what a row says to the chat template besides its messages: ``tools``, if
    it has any, and the entries of ``chat_template_kwargs``. Raises MaxlmError: tools
    that are no list of mappings, variables that are no mapping or that the encoding
    sets itself."""
    variables = _parse_column(row, "chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        message = (
            f"chat_template_kwargs is of type {type(variables).__name__}, no mapping"
        )
        fix = 'write {"enable_thinking": false}, or the like'
        raise MaxlmError(message, where="chat_template_kwargs", fix=fix)
    if reserved := sorted(_RESERVED_VARIABLES & {*variables}):
        message = (
            f"chat_template_kwargs sets {reserved[0]}, which is no variable of a "
            "template"
        )
        raise MaxlmError(message, where="chat_template_kwargs", fix="leave it out")
    # Arrow fills in null where a row says nothing.
    variables = {name: value for name, value in variables.items() if value is not None}
    tools = _parse_column(row, "tools")
    if not tools:  # Some templates write an empty frame for an empty list.
        return variables
    if not _is_list_of_mappings(tools):
        message = "tools is no list of functions"
        fix = (
            'write [{"type": "function", "function": {"name": ..., "parameters": ...}}]'
        )
        raise MaxlmError(message, where="tools", fix=fix)
    return {"tools": tools} | variables


def _is_list_of_mappings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _parse_column(row: Row, name: str) -> Any:
    """A column's value, read from JSON if it is text: Arrow has no lists of unlike
    mappings."""
    value = row.get(name)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        message = f"{name} is text that is no JSON ({error})"
        fix = "write it as JSON, or as data"
        raise MaxlmError(message, where=name, fix=fix) from None


def get_column(row: Row, name: str) -> Any:
    """Returns a row's value; raises MaxlmError if it is null, or if the row has no such
    column, which names those that it has."""
    if name not in row:
        columns = ", ".join(map(repr, row)) or "none"
        fix = "rename one of them, or use another task"
        raise MaxlmError(
            f"no column {name!r}: there are {columns}", where=name, fix=fix
        )
    if row[name] is None:
        raise MaxlmError(f"{name} is null", where=name, fix="leave the row out")
    return row[name]


def get_label(row: Row) -> bool:
    """Returns whether a row's answer is good."""
    label = get_column(row, "label")
    # 0 and 1 are equal to them: labels of files that have no booleans.
    if label not in (True, False):
        fix = "write true for a good answer, false for a bad"
        raise MaxlmError(f"label is {label!r}", where="label", fix=fix)
    return bool(label)


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a message has neither text nor what stands in its place."""
    content = message.get("content")
    if isinstance(content, str):
        content = content.strip()
    return not content and not any(message.get(name) for name in _OTHER_CONTENT)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if (
        not _is_list_of_mappings(messages)
        or not messages
        or not all(message.get("role") for message in messages)
    ):
        fix = 'give some like {"role": "user", "content": ...}'
        raise MaxlmError("no list of messages", where="messages", fix=fix)
    previous_role = None
    for i, message in enumerate(messages):
        role = message["role"]
        if not _may_follow(role, previous_role):
            fault = (
                f"roles out of order: message {i} is {role!r} after "
                f"{previous_role or 'nothing'!r}"
            )
            fix = "let system come first, then user and assistant by turns"
            raise MaxlmError(fault, where="messages", fix=fix)
        if message.get("content") is None and _is_empty(message):
            fault = f"message {i}, of role {role!r}, has no content"
            fix = "give it some, or leave the row out"
            raise MaxlmError(fault, where="messages", fix=fix)
        previous_role = role


def _may_follow(role: str, previous: str | None) -> bool:
    """Whether a message of a role may come after one of another; None: before any.
    Other roles than these may stand anywhere."""
    is_at_opening = previous in (None, *_OPENING_ROLES)
    if role in _OPENING_ROLES:
        return is_at_opening
    if role == "user":
        return previous != "user"
    if role == "assistant":
        return previous != "assistant" and not is_at_opening
    if role == "tool":
        return previous in ("assistant", "tool")
    return True
