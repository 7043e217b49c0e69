"""Conversations as text and ids, by the Jinja template that a tokenizer carries.

Templates are written for transformers' ``apply_chat_template`` and see here what they see there:
the same variables, filters and functions. A template of someone else's checkpoint is a program:
it runs in Jinja's sandbox and is given plain data only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig

Message = Mapping[str, Any]
"""A message, with at least {"role": ..., "content": ...}."""

_TEMPLATES = {
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
}
# Noncharacters: never in text that means anything, so one is free to mark places with.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def make_chat_files(config: TokenizerConfig) -> dict[str, bytes]:
    """Returns the files, by name, from which other tools and ``render_chat`` know
    ``config.chat``."""
    if config.chat is None:
        return {}
    roles = {"bos_token": config.bos, "eos_token": config.eos, "pad_token": config.pad}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | roles
    return {
        "chat_template.jinja": _TEMPLATES[config.chat].encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n",
    }


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """Renders a conversation as the text that the model was, or shall be, trained on.

    Args:
        tools: JSON schemas of functions that the model may call.
        add_generation_prompt: end with what opens the assistant's turn.
        variables: further ones of the template, such as ``enable_thinking``.
    """
    given: dict[str, Any] = {
        "messages": [_as_templates_read(each) for each in _checked(messages)],
        "tools": tools and list(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    # Plain data has no methods that the sandbox does not know.
    given = json.loads(_as_json(given | variables))
    try:
        template = _compile(get_chat_template(tokenizer, with_tools=tools is not None))
        return template.render(**_special_names(tokenizer) | given)
    except MaxlmError:
        raise
    except Exception as error:  # It is a program of someone else's: it may raise anything.
        what = f"the chat template cannot write this conversation: {error}"
        fix = "change the messages to suit the template, or the template"
        raise MaxlmError(what, fix=fix) from error


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], **settings: Any) -> list[int]:
    """Returns the ids of ``render_chat``, with special tokens where the template put them.

    Literals of special tokens within messages stay the ordinary text that they are: nobody ends a
    turn, or begins another's, by writing so. Settings are ``render_chat``'s.
    """
    settings["messages"] = list(_checked(messages))
    text = _as_json(settings)
    mark = next((m for m in _MARKS if m not in text and _escaped(m) not in text), None)
    if mark is None:
        what = "the messages hold every noncharacter from U+FDD0 to U+FDEF"
        raise MaxlmError(what, where="messages", fix="remove one of them")
    literals = list(tokenizer.special.ids)
    beginnings = {literal[:n] for literal in literals for n in range(1, len(literal))}
    longest = max(map(len, beginnings), default=0)

    def disarm(string: str) -> str:
        for literal in literals:
            string = string.replace(literal, literal[:1] + mark + literal[1:])
        return string

    def disarm_end(string: str) -> str:
        # A literal must not come about either where the template joins two strings, or trims them.
        # Words are what templates ask for, such as roles.
        string = disarm(string)
        end = len(string.rstrip())
        if string.isidentifier() or not any(
            string[max(0, end - n) : end] in beginnings for n in range(1, longest + 1)
        ):
            return string
        return string[:end] + mark + string[end:]

    rendered = render_chat(tokenizer, **_map_strings(settings, disarm, disarm_end))
    rendered = rendered.replace(_escaped(mark), mark)
    return tokenizer.encode_with_escapes(rendered, mark if mark in rendered else None)


def _escaped(char: str) -> str:
    """A character as a template's `tojson(ensure_ascii=True)` writes it."""
    return json.dumps(char)[1:-1]


def _as_templates_read(message: Message) -> Message:
    """Returns a message without what is None, its reasoning under all of transformers' names."""
    given = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((given[name] for name in names if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    is_list = isinstance(messages, (list, tuple))
    if is_list and all(isinstance(each, Mapping) for each in messages):
        return messages
    what, fix = "messages must be a list of mappings", 'give some like {"role": "user", ...}'
    raise MaxlmError(what, where="messages", fix=fix)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        what = f"a conversation must be plain data: {error}"
        fix = "give str, numbers, lists and mappings"
        raise MaxlmError(what, where="messages", fix=fix) from error


def _map_strings(value: Any, key: Callable[[str], str], change: Callable[[str], str]) -> Any:
    """Plain data with other strings: keys of mappings by `key`, all others by `change`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        pairs = ((key(k) if isinstance(k, str) else k, v) for k, v in value.items())
        return {k: _map_strings(v, key, change) for k, v in pairs}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, key, change) for item in value]
    return value


def get_chat_template(tokenizer: Tokenizer, *, with_tools: bool = False) -> str:
    """Returns the Jinja template that a tokenizer carries; ``with_tools``: the one for
    conversations with tools, where there are several.

    Raises:
        MaxlmError: it carries none.
    """
    carried = tokenizer.extra_files
    if "chat_template.jinja" in carried:
        return carried["chat_template.jinja"].decode()
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = json.loads(carried.get(name, b"{}")).get("chat_template")
        if isinstance(found, list):
            named = {each["name"]: each["template"] for each in found}
            found = (with_tools and named.get("tool_use")) or named.get("default")
        if found:
            return found
    fix = "train it with chat set, import one that has a template, or give --chat-template FILE"
    what, where = "the tokenizer carries no chat template", "chat_template.jinja"
    raise MaxlmError(what, where=where, fix=fix)


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token and so on: what the tokenizer's files say of them, or its roles."""
    special = tokenizer.special
    names: dict[str, Any] = {"bos_token": special.bos, "eos_token": special.eos}
    names["pad_token"] = special.pad
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, token in json.loads(tokenizer.extra_files.get(file, b"{}")).items():
            if name.endswith("_token") and not isinstance(token, bool):
                names[name] = token.get("content") if isinstance(token, dict) else token
    return {name: token for name, token in names.items() if token is not None}


@lru_cache(maxsize=8)  # a server renders one template again and again
def _compile(source: str):
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: what the assistant wrote, marked for training; plain text here."""

        tags: set[str] = {"generation"}  # noqa: RUF012  (as Jinja declares it)

        def parse(self, parser: Parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **layout: json.dumps(
        value, ensure_ascii=ensure_ascii, **layout
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
