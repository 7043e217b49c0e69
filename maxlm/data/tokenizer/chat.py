"""Conversations as text and ids, by the Jinja template that a tokenizer carries.

Templates are written for transformers' ``apply_chat_template`` and see here what they
see there: the same variables, filters and functions. A template of someone else's
checkpoint is a program: it runs in Jinja's sandbox and is given plain data only.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import CHAT_TOKENS, TokenizerConfig
from maxlm.runtime.json_files import parse_json

Message = Mapping[str, Any]
"""A message, with at least {"role": ..., "content": ...}."""

_TEMPLATES = {
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% "
    "endif %}",
    "llama3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if "
    "add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
}
_TEMPLATE_FILE = "chat_template.jinja"
# Of characters past U+FFFF each half of the pair.
_ESCAPE = re.compile(r"\\u[0-9a-f]{4}")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def add_chat_template(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """Lets a tokenizer write conversations as ``config.chat`` says, if it says
    anything, and stop at a turn's end; raises MaxlmError if its vocabulary lacks the
    special tokens of it."""
    if config.chat is None:
        return
    special = tokenizer.special
    needed = CHAT_TOKENS[config.chat]
    if missing := [token for token in needed if token not in special.ids]:
        what = f"the vocabulary has no special token {' or '.join(missing)}"
        fix = "use another form, or leave tokenizer.chat out and give the tokenizer a template"
        raise MaxlmError(what, where=f"tokenizer.chat={config.chat}", fix=fix)
    # Other tools, too, know a form of conversations from these files.
    roles = {
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | roles
    described = {
        "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n"
    }
    template = {_TEMPLATE_FILE: _TEMPLATES[config.chat].encode()}
    tokenizer.extra_files = described | tokenizer.extra_files | template
    stops = *tokenizer.extra_stop_ids, special.ids[needed[-1]]
    tokenizer.extra_stop_ids = tuple(dict.fromkeys(stops))


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any
) -> str:
    """Renders a conversation as the text that the model was, or shall be, trained on.

    Args:
        variables: of the template: ``tools``, JSON schemas of functions that the model
            may call; ``add_generation_prompt``: end with what opens the assistant's
            turn; any others, such as ``enable_thinking``.
    """
    return _render(tokenizer, _make_template_variables(messages, **variables))


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], **settings: Any
) -> list[int]:
    """Returns the ids of ``render_chat``, with special tokens where the template put
    them.

    Literals of special tokens within messages stay the ordinary text that they are:
    nobody ends a turn, or begins another's, by writing so. Settings are
    ``render_chat``'s.
    """
    return render_escaped_chat(tokenizer, messages, **settings).encode(tokenizer)


class EscapedChat(NamedTuple):
    """A rendered conversation, in which literals of special tokens that messages hold
    are told apart from those that the template wrote."""

    text: str
    escape_char: str | None
    """A character within each literal of a message's; None: there is none."""

    def get_plain_text(self) -> str:
        """Returns the text that ids stand for."""
        return (
            self.text
            if self.escape_char is None
            else self.text.replace(self.escape_char, "")
        )

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Returns the conversation's ids, as :func:`encode_chat` does."""
        return tokenizer.encode_with_escapes(self.text, self.escape_char)


def render_escaped_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    continues_last: bool = False,
    **settings: Any,
) -> EscapedChat:
    """Renders a conversation to be encoded later: the first half of
    :func:`encode_chat`.

    Args:
        continues_last: end with the last message's text, which is to be continued,
            rather than with what the template writes behind it.
    """
    given, (mark, edge, _) = _disarm(tokenizer, messages, settings)
    if continues_last:
        given["messages"][-1]["content"] += edge
    rendered = _render(tokenizer, given).replace(_escaped(mark), mark)
    if continues_last:
        rendered, found_edge, _ = rendered.rpartition(edge)
        if not found_edge:
            raise _make_template_error("drops the message that is to be continued")
    return EscapedChat(rendered, mark if mark in rendered else None)


def encode_chat_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    turns: Sequence[int],
    **settings: Any,
) -> tuple[list[int], list[range]]:
    """Returns the ids of ``encode_chat``, and the places among them that each of
    ``turns`` (messages by index, in order) wrote: what the template marks as {%
    generation %}, else from behind what opens the assistant's turn to its last special
    token. No token crosses a turn's beginning or end.

    Raises:
        MaxlmError: a template that drops a message, or writes a turn otherwise once
            others follow.
    """
    given, (mark, *edges) = _disarm(tokenizer, messages, settings)

    def render(stop: int, **variables: Any) -> str:
        own = given | {"messages": given["messages"][:stop]} | variables
        return _render(tokenizer, own).replace(_escaped(mark), mark)

    writers = [
        i for i, message in enumerate(messages) if message["role"] == "assistant"
    ]
    template = get_chat_template(tokenizer, with_tools=given["tools"] is not None)
    marked = {*turns} <= {*writers} and _GENERATION.search(template) is not None
    if marked:
        opening, closing = edges
        rendered = render(
            len(messages), _generation_start=opening, _generation_end=closing
        )
        pieces = rendered.replace(closing, opening).split(opening)
        text = "".join(pieces)
        if len(pieces) != 2 * len(writers) + 1:
            raise _make_template_error(
                "does not mark each assistant turn as {% generation %}"
            )
        kept = {2 * writers.index(i) + 1 for i in turns}
    else:
        text = render(len(messages))
        cuts = [0]
        for i in turns:
            is_assistant = messages[i]["role"] == "assistant"
            before = render(i, add_generation_prompt=is_assistant) if i else ""
            after = render(i + 1) if i + 1 < len(messages) else text
            is_part = text.startswith(before) and text.startswith(after)
            if not is_part or not cuts[-1] <= len(before) < len(after):
                raise _make_template_error(
                    f"drops message {i}, or writes it otherwise at the end"
                )
            cuts += [len(before), len(after)]
        pieces = [text[a:b] for a, b in pairwise([*cuts, len(text)])]
        kept = {*range(1, len(pieces), 2)}
    for i, message in enumerate(given["messages"]):
        role = message["role"]
        content = message.get("content")
        verbatim = role in ("system", "developer", "user") and isinstance(content, str)
        if verbatim and content.strip() not in text:
            raise _make_template_error(f"drops message {i}, of role {role!r}")
    ids = list[int]()
    spans = list[range]()
    special = {*tokenizer.special_tokens.values()}
    escape = mark if mark in text else None
    for number, own in enumerate(_encode_pieces(tokenizer, pieces, escape)):
        if number in kept:
            last = next(
                (n for n in range(len(own), 0, -1) if own[n - 1] in special), None
            )
            spans.append(
                range(len(ids), len(ids) + (len(own) if marked else last or len(own)))
            )
        ids += own
    return ids, spans


def check_tools_are_written(
    tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any
) -> None:
    """Checks that the chat template writes every tool, call and result of a
    conversation: many templates know none and pass them over. Raises MaxlmError, which
    names the template.

    Names of functions and texts of results are replaced by words that occur nowhere
    else, and looked for in what the template then writes: a name alone might stand
    elsewhere too.
    """
    if not variables.get("tools") and not any(
        message.get("tool_calls") or message.get("role") == "tool"
        for message in messages
    ):
        return
    probe = _make_template_variables(messages, **variables)
    text = _as_json(probe)
    stem = "probe"
    while stem in text:
        stem += "e"
    labels = dict[str, str]()

    def make_word(label: str) -> str:
        word = f"{stem}x{len(labels)}x"
        labels[word] = label
        return word

    for tool in probe["tools"] or ():
        function = _get_function(tool)
        if function is not None:
            function["name"] = make_word(f"the tool {function['name']!r}")
    for number, message in enumerate(probe["messages"]):
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = _get_function(call)
            if function is not None:
                label = f"the call of {function['name']!r} in message {number}"
                function["name"] = make_word(label)
        content = message.get("content")
        if (
            message.get("role") == "tool"
            and isinstance(content, str)
            and content.strip()
        ):
            message["content"] = make_word(f"the result of a tool in message {number}")
    try:
        written = _render(tokenizer, probe)
    except MaxlmError:
        # A template may refuse names that are none of its own, and then knows of calls;
        # what is wrong with the conversation itself is said when it is encoded.
        return
    lost = [label for word, label in labels.items() if word not in written]
    if lost:
        name, _ = _find_chat_template(tokenizer, probe["tools"] is not None)
        fix = "use a tokenizer whose template knows tools, or leave the row out"
        raise MaxlmError(
            f"the chat template {name} does not write {lost[0]}", where=name, fix=fix
        )


def _get_function(entry: Any) -> dict[str, Any] | None:
    """The part of a tool or a call that has the function's name; None: it has none."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
    return function if is_named else None


def _encode_pieces(
    tokenizer: Tokenizer, pieces: Sequence[str], escape: str | None
) -> Iterator[list[int]]:
    """Encodes a text cut into pieces; together they are the text's own ids."""
    if tokenizer.lossless:  # What a piece is encoded as depends on no other.
        yield from (tokenizer.encode_with_escapes(piece, escape) for piece in pieces)
        return
    text = ""
    before = list[int]()
    for piece in pieces:
        text += piece
        ids = tokenizer.encode_with_escapes(text, escape)
        if ids[: len(before)] != before:
            raise _make_template_error(
                "lets a token cross the beginning or end of a turn"
            )
        yield ids[len(before) :]
        before = ids


def _make_template_error(fault: str) -> MaxlmError:
    fix = "set task.turns=last, or give the tokenizer a template with {% generation %} marks"
    return MaxlmError(f"the chat template {fault}", where=_TEMPLATE_FILE, fix=fix)


def _make_template_variables(
    messages: Sequence[Message], *, tools: Any = None, **variables: Any
) -> dict[str, Any]:
    if not isinstance(messages, list | tuple) or not all(
        isinstance(m, Mapping) for m in messages
    ):
        what, fix = (
            "messages must be a list of mappings",
            'give some like {"role": "user", ...}',
        )
        raise MaxlmError(what, where="messages", fix=fix)
    given: dict[str, Any] = {
        "messages": [_as_templates_read(each) for each in messages],
        "tools": tools and list(tools),
        "documents": None,
        "add_generation_prompt": False,
    }
    # Plain data has no methods that the sandbox does not know.
    return json.loads(_as_json(given | variables))


def _render(tokenizer: Tokenizer, given: dict[str, Any]) -> str:
    source = get_chat_template(tokenizer, with_tools=given["tools"] is not None)
    try:
        return _compile(source).render(**_special_names(tokenizer) | given)
    except (
        Exception
    ) as error:  # It is a program of someone else's: it may raise anything.
        what = f"the chat template cannot write this conversation: {error}"
        fix = "change the messages to suit the template, or the template"
        raise MaxlmError(what, fix=fix) from error


def _disarm(
    tokenizer: Tokenizer, messages: Sequence[Message], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A template's variables, with a character within each literal of a special token;
    it, and others that occur nowhere either."""
    given = _make_template_variables(messages, **settings)
    free = _find_unused_chars(_as_json(given), 3)
    mark = free[0]
    literals, firsts, beginnings = _list_literals(tokenizer)

    def disarm(string: str) -> str:
        if any(char in string for char in firsts):
            for literal in literals:
                string = string.replace(literal, literal[:1] + mark + literal[1:])
        # A literal must not come about either where the template joins two strings, or
        # trims them. Words are what templates ask for, such as roles.
        end = len(string.rstrip())
        if string.isidentifier() or not string.endswith(beginnings, 0, end):
            return string
        return string[:end] + mark + string[end:]

    return _map_strings(given, disarm), free


def _find_unused_chars(text: str, count: int) -> list[str]:
    """Returns characters that are not in a text, nor escaped as JSON does. Raises
    MaxlmError: it has too many of them, which a server's client may send to see what
    happens."""
    chars = {*text}
    # One pass over the text: looking for each candidate in it would take its length
    # times theirs.
    escapes = {*_ESCAPE.findall(text)}
    unused: list[str] = []
    # Noncharacters come first: they are never in text that means anything.
    for char in map(chr, range(0xFDD0, 0x110000)):
        if char not in chars and not escapes.issuperset(
            _ESCAPE.findall(_escaped(char))
        ):
            unused.append(char)
            if len(unused) == count:
                return unused
    raise MaxlmError(
        "the conversation has every character from U+FDD0 on; three must be left to "
        "mark literals "
        "of special tokens with",
        where="messages",
        fix="leave noncharacters such as U+FDD0 to U+FDD2 out",
    )


@lru_cache(maxsize=8)
def _list_literals(tokenizer: Tokenizer) -> tuple[list[str], set[str], tuple[str, ...]]:
    """Literals of special tokens, their first characters, and all their beginnings."""
    literals = list(tokenizer.special.ids)
    beginnings = {literal[:n] for literal in literals for n in range(1, len(literal))}
    return literals, {literal[:1] for literal in literals}, tuple(beginnings)


def _escaped(char: str) -> str:
    """A character as a template's `tojson(ensure_ascii=True)` writes it."""
    return json.dumps(char)[1:-1]


def _as_templates_read(message: Message) -> Message:
    """Returns a message without what is None, its reasoning under all of transformers'
    names."""
    given = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((given[name] for name in names if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        what = f"a conversation must be plain data: {error}"
        fix = "give str, numbers, lists and mappings"
        raise MaxlmError(what, where="messages", fix=fix) from error


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with other strings, keys of mappings too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(k): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value


def get_chat_template(tokenizer: Tokenizer, *, with_tools: bool = False) -> str:
    """Returns the Jinja template that a tokenizer carries; ``with_tools``: the one for
    conversations with tools, where there are several. Raises MaxlmError: it carries
    none."""
    return _find_chat_template(tokenizer, with_tools)[1]


def _find_chat_template(tokenizer: Tokenizer, with_tools: bool) -> tuple[str, str]:
    """The name and the source of the template that a tokenizer carries."""
    carried = tokenizer.extra_files
    if _TEMPLATE_FILE in carried:
        source = carried[_TEMPLATE_FILE].decode()
        # One of ours is known by the name that `tokenizer.chat` has for it.
        names = [name for name, template in _TEMPLATES.items() if template == source]
        return (names[0] if names else _TEMPLATE_FILE), source
    for file in ("chat_template.json", "tokenizer_config.json"):
        found = _read_json(carried.get(file, b"{}")).get("chat_template")
        if isinstance(found, list):
            named = {each["name"]: each["template"] for each in found}
            for name in ("tool_use", "default") if with_tools else ("default",):
                if named.get(name):
                    return f"{name} of {file}", named[name]
        elif found:
            return file, found
    fix = "set tokenizer.chat, import one that has a template, or give --chat-template FILE"
    raise MaxlmError(
        "the tokenizer carries no chat template", where=_TEMPLATE_FILE, fix=fix
    )


@lru_cache(maxsize=16)  # These files are long, and every text needs them.
def _read_json(data: bytes) -> Mapping[str, Any]:
    values = parse_json(data, "the tokenizer's settings", "import the tokenizer again")
    return values if isinstance(values, dict) else {}


def _special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token and so on: what the tokenizer's files say of them, or its
    roles."""
    special = tokenizer.special
    names = {
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
    }
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, token in _read_json(tokenizer.extra_files.get(file, b"{}")).items():
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
        """{% generation %}: what the assistant wrote, between two variables' values, if
        given."""

        tags: set[str] = {"generation"}  # noqa: RUF012  (as Jinja declares it)

        def parse(self, parser: Parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            names = (nodes.Name(f"_generation_{n}", "load") for n in ("start", "end"))
            start, end = (nodes.Output([name]) for name in names)
            return nodes.Scope([start, *body, end], lineno=line)

    def refuse(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **layout: (
        json.dumps(value, ensure_ascii=ensure_ascii, **layout)
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
