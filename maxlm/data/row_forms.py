"""Rows of files in the forms of other tools, brought into the forms that tasks read.

Tasks read the columns ``messages``, ``prompt``, ``completion``, ``chosen``,
``rejected`` and ``label`` (:mod:`maxlm.data.conversations`). Two other forms are
common:

- ShareGPT: a list ``conversations`` of {"from": ..., "value": ...}, with speakers
  ``human``, ``gpt``, ``function_call`` and ``observation``, and perhaps a column
  ``system``.
- Alpaca: ``instruction``, ``input`` and ``output``, and perhaps ``system`` and
  ``history``.

A conversion adds columns and removes none, so that a task of one's own still finds what
it reads.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeGuard

from maxlm.config import MaxlmError

Row = dict[str, Any]
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_ANSWER_COLUMNS = ("chosen", "rejected", "completion")


def convert_row(row: Row, columns: Mapping[str, str]) -> Row:
    """Returns a row with the columns that tasks read, those of its own among them.

    Args:
        columns: names in the file by the names that tasks read: {"prompt": "question"}.
            Columns that the row lacks are passed over.
    """
    row = rename_columns(row, columns)
    # Parquet has null where a row lacks a column that another has.
    has_messages = row.get("messages") is not None
    has_prompt = row.get("prompt") is not None
    if not has_messages:
        if isinstance(row.get("conversations"), list):
            row = _convert_sharegpt(row)
        elif "instruction" in row and not has_prompt:
            row = _convert_alpaca(row)
    for name in ("messages", "prompt", *_ANSWER_COLUMNS):
        if _has_speakers(row.get(name)):
            messages = [_convert_message(message) for message in row[name]]
            row = row | {name: messages}
    return row


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Returns a row whose columns are renamed as :func:`convert_row` says."""
    if not columns:
        return row
    renamed = {name: row[source] for name, source in columns.items() if source in row}
    taken = set(columns.values())
    others = {name: value for name, value in row.items() if name not in taken}
    return others | renamed


def _convert_sharegpt(row: Row) -> Row:
    messages = [_convert_message(message) for message in row["conversations"]]
    messages = [*_make_system_messages(row), *messages]
    if not {"chosen", "rejected"} <= {*row}:
        return row | {"messages": messages}
    # A pair: the conversation is the prompt, and each answer may be a lone message.
    answers = {name: _wrap_message(row[name]) for name in ("chosen", "rejected")}
    return row | {"prompt": messages} | answers


def _convert_alpaca(row: Row) -> Row:
    messages = _make_system_messages(row)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(map(_is_exchange, history)):
        message = "history is no list of pairs of texts"
        fix = 'write [["question", "answer"], ...]'
        raise MaxlmError(message, where="history", fix=fix)
    for question, answer in history:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    parts = [part for part in (row["instruction"], row.get("input")) if part]
    fix = "write text there, or leave the row out"
    if not parts:
        raise MaxlmError("the instruction is empty", where="instruction", fix=fix)
    if not all(isinstance(part, str) for part in parts):
        message = "instruction and input are no text"
        raise MaxlmError(message, where="instruction", fix=fix)
    messages.append({"role": "user", "content": "\n".join(parts)})
    converted = row | {"prompt": messages}
    if "output" in row and row.get("completion") is None:
        converted["completion"] = row["output"]
    return converted


def _is_exchange(value: object) -> bool:
    """Whether a value is a question and its answer."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(isinstance(text, str) for text in value)


def _make_system_messages(row: Row) -> list[dict[str, Any]]:
    system = row.get("system")
    return [{"role": "system", "content": system}] if system else []


def _wrap_message(answer: object) -> object:
    """A lone message as a list of one; a text or a list as it is."""
    return [answer] if isinstance(answer, Mapping) else answer


def _has_speakers(value: object) -> bool:
    """Whether a value is a list with messages of ShareGPT's."""
    return isinstance(value, list) and any(map(_is_sharegpt_message, value))


def _is_sharegpt_message(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and ("from" in value or "value" in value)


def _convert_message(message: object) -> object:
    """A message of ShareGPT's as one of role and content; anything else as it is."""
    if not _is_sharegpt_message(message):
        return message
    converted = dict(message)
    speaker = converted.pop("from", message.get("role"))
    content = converted.pop("value", message.get("content"))
    if isinstance(speaker, str):
        converted["role"] = _SHAREGPT_ROLES.get(speaker, speaker)
    if speaker == "function_call":
        return converted | {"content": "", "tool_calls": _parse_function_calls(content)}
    return converted | {"content": content}


def _parse_function_calls(text: object) -> list[dict[str, Any]]:
    """The calls that a turn of ``function_call`` writes as JSON: one, or a list."""
    calls = None
    if isinstance(text, str | bytes):
        with suppress(ValueError, RecursionError):
            calls = json.loads(text)
    if not isinstance(calls, list):
        calls = [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        message = (
            f"a turn from function_call holds {str(text)[:40]!r}, no JSON of a call"
        )
        fix = 'write {"name": ..., "arguments": {...}}'
        raise MaxlmError(message, where="conversations", fix=fix)
    return [{"type": "function", "function": call} for call in calls]


def check_columns_exist(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], where: str
) -> None:
    """Checks that each column that a map names is in one of some rows; raises
    MaxlmError."""
    present = dict.fromkeys(name for row in rows for name in row)
    for name, source in columns.items():
        if source not in present:
            listed = ", ".join(map(repr, present)) or "none"
            message = (
                f"no column {source!r}, which task.columns names for {name}: there are "
                f"{listed}"
            )
            raise MaxlmError(message, where=where, fix="name one of them")
