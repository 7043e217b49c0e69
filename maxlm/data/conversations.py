"""Conversations, prompts and answers as token ids, each with whether the model learns
to write it.

Rows of files have one of these forms, the values of ``prompt``, ``completion``,
``chosen`` and ``rejected`` being text or lists of messages, {"role": ..., "content":
...}:

=====================================  =================================================
``messages``                           a conversation
``prompt``, ``completion``             a prompt and an answer to it
``prompt``, ``chosen``, ``rejected``   two answers, of which one is better; with messages the
                                       prompt may be left out: what both begin with
``prompt``, ``completion``, ``label``  an answer and whether it is good: true or false
=====================================  =================================================

Beside messages a row may have ``tools``, the functions that the model may call, and
``chat_template_kwargs``, variables of the chat template; both also as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from maxlm.config import MaxlmError
from maxlm.data.tokenizer import Tokenizer, check_tools_are_written, encode_chat_turns

Turns = Literal["all", "last"]
Row = Mapping[str, Any]
_OPENING_ROLES = ("system", "developer")
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
) -> EncodedSequence:
    """Encodes a conversation by the tokenizer's chat template; see
    ``encode_chat_turns`` for which tokens of a turn are learnt. A message with
    ``"train": false`` is not learnt. Raises MaxlmError: no turn to learn or an empty
    one, roles out of order, a template that drops or rewrites turns, tools or calls.

    Args:
        turns: which turns of ``roles`` are learnt.
        num_prompt_messages: messages at the beginning that are not learnt.
        variables: of the template, as :func:`read_template_variables` returns them.
    """
    variables = variables or {}
    _check_messages(messages)
    learnt = [
        i
        for i, message in enumerate(messages)
        # Parquet fills in null where a message says nothing.
        if i >= num_prompt_messages
        and message["role"] in roles
        and message.get("train") is not False
    ]
    if not learnt:
        own = dict.fromkeys(str(each["role"]) for each in messages)
        what = f"no {' or '.join(roles)} turn to learn: the roles are {', '.join(own)}"
        raise MaxlmError(
            what, where="messages", fix="leave the row out, or end it with an answer"
        )
    learnt = learnt[-1:] if turns == "last" else learnt
    if empty := [i for i in learnt if _is_empty(messages[i])]:
        what = f"an empty completion: message {empty[0]} has no text"
        raise MaxlmError(what, where="messages", fix="leave the row out")
    written = [
        {k: v for k, v in message.items() if k != "train"} for message in messages
    ]
    check_tools_are_written(tokenizer, written, **variables)
    tokens, spans = encode_chat_turns(tokenizer, written, learnt, **variables)
    targets = {place for span in spans for place in span}
    return EncodedSequence(tokens, [place in targets for place in range(len(tokens))])


def encode_answer(
    tokenizer: Tokenizer,
    prompt: Any,
    answer: Any,
    variables: Mapping[str, Any] | None = None,
) -> EncodedSequence:
    """Encodes a prompt and the answer to learn: texts, which the end-of-text token
    follows, or lists of messages; raises MaxlmError if they are neither, or the answer
    is empty.

    Args:
        variables: of the template, as :func:`read_template_variables` returns them.
    """
    for name, value in (("the prompt", prompt), ("the completion", answer)):
        if not isinstance(value, str | list):
            what = f"{name} is of type {type(value).__name__}, neither text nor a list of messages"
            raise MaxlmError(what, where=name, fix="write one of them")
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise MaxlmError(
            "an empty completion", where="completion", fix="leave the row out"
        )
    if isinstance(prompt, str) and isinstance(answer, str):
        if variables:
            what = f"{' and '.join(variables)} beside a prompt and a completion of plain text"
            fix = (
                "write the prompt as messages, which the chat template writes with them"
            )
            raise MaxlmError(what, where="prompt", fix=fix)
        before = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
        # As one text, where no token crosses: some tokenizers write a space before any
        # text.
        whole = [*tokenizer.prefix_ids, *tokenizer.encode(prompt + answer)]
        if whole[: len(before)] != before:
            whole = before + tokenizer.encode(answer)
        is_target = [False] * len(before) + [True] * (len(whole) + 1 - len(before))
        return EncodedSequence([*whole, tokenizer.eos_id], is_target)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return encode_conversation(
        tokenizer,
        [*prompt, *answer],
        num_prompt_messages=len(prompt),
        variables=variables,
    )


def encode_pair(
    tokenizer: Tokenizer, row: Row
) -> tuple[EncodedSequence, EncodedSequence]:
    """Encodes the chosen and the rejected answer of a row, each after its prompt."""
    chosen, rejected = get_column(row, "chosen"), get_column(row, "rejected")
    if chosen == rejected:
        raise MaxlmError(
            "chosen equals rejected", where="chosen", fix="leave the row out"
        )
    prompt = row.get("prompt")
    are_lists = isinstance(chosen, list) and isinstance(rejected, list)
    if prompt is None and not are_lists:
        prompt = get_column(row, "prompt")
    size = 0
    if are_lists and not isinstance(prompt, list):
        while chosen[size : size + 1] == rejected[size : size + 1]:
            size += 1
    # Some data sets say the prompt twice: as text, and as what both conversations begin
    # with.
    if size or prompt is None:
        prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    variables = read_template_variables(row)
    return (
        encode_answer(tokenizer, prompt, chosen, variables),
        encode_answer(tokenizer, prompt, rejected, variables),
    )


def read_template_variables(row: Row) -> dict[str, Any]:
    """Returns what a row says to the chat template besides its messages: ``tools``, if
    it has any, and the entries of ``chat_template_kwargs``. Raises MaxlmError: tools
    that are no list of mappings, variables that are no mapping or that the encoding
    sets itself."""
    variables = _parse_column(row, "chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        what = f"chat_template_kwargs is of type {type(variables).__name__}, no mapping"
        fix = 'write {"enable_thinking": false}, or the like'
        raise MaxlmError(what, where="chat_template_kwargs", fix=fix)
    if reserved := sorted(_RESERVED_VARIABLES & {*variables}):
        what = f"chat_template_kwargs sets {reserved[0]}, which is no variable of a template"
        raise MaxlmError(what, where="chat_template_kwargs", fix="leave it out")
    # Arrow fills in null where a row says nothing.
    variables = {name: value for name, value in variables.items() if value is not None}
    tools = _parse_column(row, "tools")
    if not tools:  # Some templates write an empty frame for an empty list.
        return variables
    if not isinstance(tools, list) or not all(
        isinstance(tool, Mapping) for tool in tools
    ):
        what = "tools is no list of functions"
        fix = (
            'write [{"type": "function", "function": {"name": ..., "parameters": ...}}]'
        )
        raise MaxlmError(what, where="tools", fix=fix)
    return {"tools": tools} | variables


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
        fix = "write it as JSON, or as data"
        raise MaxlmError(
            f"{name} is text that is no JSON ({error})", where=name, fix=fix
        ) from None


def get_column(row: Row, name: str) -> Any:
    """Returns a row's value; raises MaxlmError if it is null, or naming the columns
    there are."""
    if row.get(name) is None:
        if name in row:
            raise MaxlmError(f"{name} is null", where=name, fix="leave the row out")
        what = f"no column {name!r}: there are {', '.join(map(repr, row)) or 'none'}"
        raise MaxlmError(
            what, where=name, fix="rename one of them, or use another task"
        )
    return row[name]


def get_label(row: Row) -> bool:
    """Returns whether a row's answer is good."""
    label = get_column(row, "label")
    if label not in (True, False) or isinstance(label, str):
        what = f"label is {label!r}"
        raise MaxlmError(
            what, where="label", fix="write true for a good answer, false for a bad"
        )
    return bool(label)


def _is_empty(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return not (content.strip() if isinstance(content, str) else content) and not any(
        message.get(name)
        for name in ("tool_calls", "reasoning_content", "thinking", "reasoning")
    )


def _check_messages(messages: Any) -> None:
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(
        isinstance(m, Mapping) and m.get("role") for m in messages
    ):
        what, fix = (
            "no list of messages",
            'give some like {"role": "user", "content": ...}',
        )
        raise MaxlmError(what, where="messages", fix=fix)
    before = None
    for i, message in enumerate(messages):
        role = message["role"]
        late = role in _OPENING_ROLES and before not in (None, *_OPENING_ROLES)
        early = role == "tool" and before not in ("assistant", "tool")
        repeated = role in ("user", "assistant") and role == before
        first = role == "assistant" and before in (None, *_OPENING_ROLES)
        if late or early or repeated or first:
            what = f"roles out of order: message {i} is {role!r} after {before or 'nothing'!r}"
            fix = "let system come first, then user and assistant by turns"
            raise MaxlmError(what, where="messages", fix=fix)
        if message.get("content") is None and _is_empty(message):
            what = f"message {i}, of role {role!r}, has no content"
            raise MaxlmError(
                what, where="messages", fix="give it some, or leave the row out"
            )
        before = role
