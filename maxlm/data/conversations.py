"""Conversations, prompts and answers as token ids, each with whether the model learns to write it.

Rows of files have one of these forms, the values of ``prompt``, ``completion``, ``chosen`` and
``rejected`` being text or lists of messages, {"role": ..., "content": ...}:

=====================================  ========================================================
``messages``                           a conversation
``prompt``, ``completion``             a prompt and an answer to it
``prompt``, ``chosen``, ``rejected``   two answers, of which one is better; with messages the
                                       prompt may be left out: what both begin with
``prompt``, ``completion``, ``label``  an answer and whether it is good: true or false
=====================================  ========================================================
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from maxlm.config import MaxlmError
from maxlm.data.tokenizer import Tokenizer, encode_chat

Turns = Literal["all", "last"]
Row = Mapping[str, Any]
_OPENING_ROLES = ("system", "developer")


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
    tools: Any = None,
) -> EncodedSequence:
    """Encodes a conversation by the tokenizer's chat template.

    A turn is learnt from behind what opens it (``add_generation_prompt``) to its last special
    token. A message with ``"train": false`` is not learnt.

    Args:
        turns: which turns of ``roles`` are learnt.
        num_prompt_messages: messages at the beginning that are not learnt.

    Raises:
        MaxlmError: no turn to learn, roles out of order, a template that writes a turn otherwise
            once others follow, or drops it.
    """
    _check_roles(messages, roles)
    chosen = [
        i
        for i, message in enumerate(messages)
        if i >= num_prompt_messages and message["role"] in roles and message.get("train", True)
    ]
    if not chosen:
        what = f"no {' or '.join(roles)} turn"
        raise MaxlmError(what, where="messages", fix="leave the row out, or end it with an answer")
    given = [{k: v for k, v in message.items() if k != "train"} for message in messages]
    settings = {} if tools is None else {"tools": tools}
    tokens = encode_chat(tokenizer, given, **settings)
    is_target = [False] * len(tokens)
    special = {*tokenizer.special_tokens.values()}
    for i in chosen[-1:] if turns == "last" else chosen:
        opened = messages[i]["role"] == "assistant"
        before = encode_chat(tokenizer, given[:i], add_generation_prompt=opened, **settings)
        after = tokens
        if i + 1 < len(given):
            after = encode_chat(tokenizer, given[: i + 1], **settings)
        if tokens[: len(before)] != before or tokens[: len(after)] != after:
            what = f"the chat template writes turn {i} otherwise, or drops it, where others follow"
            fix = "set task.turns=last, or use another template"
            raise MaxlmError(what, where="messages", fix=fix)
        end = next((n for n in range(len(after), len(before), -1) if after[n - 1] in special), None)
        for n in range(len(before), end or len(after)):
            is_target[n] = True
    return EncodedSequence(tokens, is_target)


def encode_answer(tokenizer: Tokenizer, prompt: Any, answer: Any) -> EncodedSequence:
    """Encodes a prompt and the answer to learn: texts, which the end-of-text token follows, or
    lists of messages; raises MaxlmError if they are neither, or the answer is empty."""
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise MaxlmError("an empty completion", where="completion", fix="leave the row out")
    if isinstance(prompt, str) and isinstance(answer, str):
        before = [*tokenizer.prefix_ids, *tokenizer.encode(prompt)]
        learnt = [*tokenizer.encode(answer), tokenizer.eos_id]
        return EncodedSequence(before + learnt, [False] * len(before) + [True] * len(learnt))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(prompt, list) or not isinstance(answer, list):
        what, fix = "neither text nor a list of messages", "write one of them"
        raise MaxlmError(what, where="prompt", fix=fix)
    return encode_conversation(
        tokenizer, [*prompt, *answer], num_prompt_messages=len(prompt), turns="all"
    )


def encode_pair(tokenizer: Tokenizer, row: Row) -> tuple[EncodedSequence, EncodedSequence]:
    """Encodes the chosen and the rejected answer of a row, each after its prompt."""
    chosen, rejected = get_column(row, "chosen"), get_column(row, "rejected")
    if chosen == rejected:
        raise MaxlmError("chosen equals rejected", where="chosen", fix="leave the row out")
    prompt = row.get("prompt")
    if prompt is None:
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise MaxlmError("no prompt", where="prompt", fix="give one")
        size = 0
        while chosen[size : size + 1] == rejected[size : size + 1]:
            size += 1
        prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    return encode_answer(tokenizer, prompt, chosen), encode_answer(tokenizer, prompt, rejected)


def get_column(row: Row, name: str) -> Any:
    """Returns a value of a row; raises MaxlmError naming the columns that there are."""
    if row.get(name) is None:
        what = f"no column {name!r}: there are {', '.join(map(repr, row))}"
        raise MaxlmError(what, where=name, fix="rename the file's columns, or use another task")
    return row[name]


def get_label(row: Row) -> bool:
    """Returns whether a row's answer is good."""
    label = get_column(row, "label")
    if label not in (True, False) or isinstance(label, str):
        what = f"label is {label!r}"
        raise MaxlmError(what, where="label", fix="write true for a good answer, false for a bad")
    return bool(label)


def _check_roles(messages: Any, learnt: Sequence[str]) -> None:
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        what, fix = "no list of messages", 'give some like {"role": "user", "content": ...}'
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
        before = role
