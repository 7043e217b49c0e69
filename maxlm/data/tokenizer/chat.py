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
from typing import TYPE_CHECKING, Any, NamedTuple

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import CHAT_TOKENS, TokenizerConfig
from maxlm.runtime.json_files import parse_json

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""A message, with at least {"role": ..., "content": ...}."""
TemplateVariable = Any
"""A variable of a chat template: any plain data. Which there are is up to the template's
author, as with ``apply_chat_template`` of transformers."""

_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n'"
        " + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\\n' }}"
        "{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{% endif %}"
    ),
}
_TEMPLATE_FILE = "chat_template.jinja"
# A character that JSON escapes; of those past U+FFFF each half of the pair.
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
        message = f"the vocabulary has no special token {' or '.join(missing)}"
        fix = (
            "use another form, or leave tokenizer.chat out and give the tokenizer a "
            "template"
        )
        raise MaxlmError(message, where=f"tokenizer.chat={config.chat}", fix=fix)
    # Other tools, too, know a form of conversations from these files. An imported
    # tokenizer has a tokenizer_config.json of its own, which stays.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
    }
    settings_json = json.dumps(settings, indent=2)
    extra_files = {"tokenizer_config.json": f"{settings_json}\n".encode()}
    extra_files |= tokenizer.extra_files
    extra_files[_TEMPLATE_FILE] = _TEMPLATES[config.chat].encode()
    tokenizer.extra_files = extra_files
    turn_end = needed[-1]
    stop_ids = (*tokenizer.extra_stop_ids, special.ids[turn_end])
    tokenizer.extra_stop_ids = tuple(dict.fromkeys(stop_ids))


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], **variables: TemplateVariable
) -> str:
    """Renders a conversation as the text that the model was, or shall be, trained on.

    Args:
        variables: of the template: ``tools``, JSON schemas of functions that the model
            may call; ``add_generation_prompt``: end with what opens the assistant's
            turn; any others, such as ``enable_thinking``.
    """
    return _render(tokenizer, _make_template_variables(messages, **variables))


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], **settings: TemplateVariable
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
        if self.escape_char is None:
            return self.text
        return self.text.replace(self.escape_char, "")

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Returns the conversation's ids, as :func:`encode_chat` does."""
        return tokenizer.encode_with_escapes(self.text, self.escape_char)


def render_escaped_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    continues_last: bool = False,
    **settings: TemplateVariable,
) -> EscapedChat:
    """Renders a conversation to be encoded later: the first half of
    :func:`encode_chat`.

    Args:
        continues_last: end with the last message's text, which is to be continued,
            rather than with what the template writes behind it.
    """
    variables, mark, edge, _ = _disarm(tokenizer, messages, settings)
    if continues_last:
        variables["messages"][-1]["content"] += edge
    rendered = _render(tokenizer, variables).replace(_escape_as_json(mark), mark)
    if continues_last:
        before_edge, separator, _ = rendered.rpartition(edge)
        if not separator:
            raise _make_template_error("drops the message that is to be continued")
        rendered = before_edge
    return EscapedChat(rendered, mark if mark in rendered else None)


def encode_chat_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    turns: Sequence[int],
    **settings: TemplateVariable,
) -> tuple[list[int], list[range]]:
    """Returns the ids of ``encode_chat``, and the places among them that each of
    ``turns`` (messages by index, in order) wrote: what the template marks as {%
    generation %}, else from behind what opens the assistant's turn to its last special
    token. No token crosses a turn's beginning or end.

    Raises:
        MaxlmError: a template that drops a message, or writes a turn otherwise once
            others follow.
    """
    variables, mark, generation_start, generation_end = _disarm(
        tokenizer, messages, settings
    )

    def render(num_messages: int, **extra_variables: TemplateVariable) -> str:
        first_messages = variables["messages"][:num_messages]
        all_variables = variables | {"messages": first_messages} | extra_variables
        rendered = _render(tokenizer, all_variables)
        return rendered.replace(_escape_as_json(mark), mark)

    # The text is cut into pieces before and behind each turn, or each part that the
    # template marks; `turn_pieces` says which of them are those of `turns`.
    assistant_turns = [
        i for i, message in enumerate(messages) if message["role"] == "assistant"
    ]
    template = get_chat_template(tokenizer, with_tools=variables["tools"] is not None)
    are_all_assistant = {*turns} <= {*assistant_turns}
    uses_marks = are_all_assistant and _GENERATION.search(template) is not None
    if uses_marks:
        rendered = render(
            len(messages),
            _generation_start=generation_start,
            _generation_end=generation_end,
        )
        # Starts and ends take turns: pieces at odd places are what is marked.
        cut_text = rendered.replace(generation_end, generation_start)
        pieces = cut_text.split(generation_start)
        if len(pieces) != 2 * len(assistant_turns) + 1:
            raise _make_template_error(
                "does not mark each assistant turn as {% generation %}"
            )
        turn_pieces = {2 * assistant_turns.index(i) + 1 for i in turns}
    else:
        pieces = _cut_around_turns(messages, turns, render)
        turn_pieces = {*range(1, len(pieces), 2)}
    text = "".join(pieces)
    _check_texts_are_written(variables["messages"], text)
    ids: list[int] = []
    spans: list[range] = []
    special_ids = {*tokenizer.special_tokens.values()}
    escape_char = mark if mark in text else None
    encoded_pieces = _encode_pieces(tokenizer, pieces, escape_char)
    for number, piece_ids in enumerate(encoded_pieces):
        if number in turn_pieces:
            length = len(piece_ids)
            if not uses_marks:
                # Behind the turn's last special token stands what separates turns.
                length = _find_last_special_end(piece_ids, special_ids) or length
            spans.append(range(len(ids), len(ids) + length))
        ids += piece_ids
    return ids, spans


def _cut_around_turns(
    messages: Sequence[Message], turns: Sequence[int], render: Callable[..., str]
) -> list[str]:
    """The whole text in pieces, those of ``turns`` at odd places. A turn is what the
    conversation gains by it, when it is rendered with the messages up to it."""
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
    return [text[start:stop] for start, stop in pairwise([*cuts, len(text)])]


def _check_texts_are_written(messages: Sequence[Message], text: str) -> None:
    """Checks that a rendered conversation has what the system and the user say, which
    templates write as it is."""
    for i, message in enumerate(messages):
        role = message["role"]
        content = message.get("content")
        is_verbatim = role in ("system", "developer", "user")
        if is_verbatim and isinstance(content, str) and content.strip() not in text:
            raise _make_template_error(f"drops message {i}, of role {role!r}")


def _find_last_special_end(ids: Sequence[int], special_ids: set[int]) -> int | None:
    """The place behind the last special token; None: there is none."""
    for end in range(len(ids), 0, -1):
        if ids[end - 1] in special_ids:
            return end
    return None


def check_tools_are_written(
    tokenizer: Tokenizer, messages: Sequence[Message], **variables: TemplateVariable
) -> None:
    """Checks that the chat template writes every tool, call and result of a
    conversation: many templates know none and pass them over. Raises MaxlmError, which
    names the template.

    Names of functions and texts of results are replaced by words that occur nowhere
    else, and looked for in what the template then writes: a name alone might stand
    elsewhere too.
    """
    uses_tools = any(
        message.get("tool_calls") or message.get("role") == "tool"
        for message in messages
    )
    if not uses_tools and not variables.get("tools"):
        return
    probe = _make_template_variables(messages, **variables)
    text = _to_json(probe)
    stem = "probe"
    while stem in text:
        stem += "e"
    label_by_word: dict[str, str] = {}

    def make_word(label: str) -> str:
        word = f"{stem}x{len(label_by_word)}x"
        label_by_word[word] = label
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
        has_text = isinstance(content, str) and content.strip()
        if message.get("role") == "tool" and has_text:
            message["content"] = make_word(f"the result of a tool in message {number}")
    try:
        rendered = _render(tokenizer, probe)
    except MaxlmError:
        # A template may refuse names that are none of its own, and then knows of calls;
        # what is wrong with the conversation itself is said when it is encoded.
        return
    for word, label in label_by_word.items():
        if word not in rendered:
            name, _ = _find_chat_template(tokenizer, probe["tools"] is not None)
            fault = f"the chat template {name} does not write {label}"
            fix = "use a tokenizer whose template knows tools, or leave the row out"
            raise MaxlmError(fault, where=name, fix=fix)


def _get_function(entry: object) -> dict[str, Any] | None:
    """The part of a tool or a call that has the function's name; None: it has none."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
    return function if is_named else None


def _encode_pieces(
    tokenizer: Tokenizer, pieces: Sequence[str], escape_char: str | None
) -> Iterator[list[int]]:
    """Encodes a text cut into pieces; together they are the text's own ids."""
    if tokenizer.lossless:  # What a piece is encoded as depends on no other.
        for piece in pieces:
            yield tokenizer.encode_with_escapes(piece, escape_char)
        return
    text = ""
    ids_before: list[int] = []
    for piece in pieces:
        text += piece
        ids = tokenizer.encode_with_escapes(text, escape_char)
        num_before = len(ids_before)
        if ids[:num_before] != ids_before:
            raise _make_template_error(
                "lets a token cross the beginning or end of a turn"
            )
        yield ids[num_before:]
        ids_before = ids


def _make_template_error(fault: str) -> MaxlmError:
    fix = (
        "set task.turns=last, or give the tokenizer a template with {% generation %} "
        "marks"
    )
    return MaxlmError(f"the chat template {fault}", where=_TEMPLATE_FILE, fix=fix)


def _make_template_variables(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: TemplateVariable,
) -> dict[str, Any]:
    """The variables that a template sees, as plain data: it has no methods that the
    sandbox does not know."""
    is_sequence = isinstance(messages, list | tuple)
    if not is_sequence or not all(isinstance(item, Mapping) for item in messages):
        fault = "messages must be a list of mappings"
        fix = 'give some like {"role": "user", ...}'
        raise MaxlmError(fault, where="messages", fix=fix)
    all_variables: dict[str, Any] = {
        "messages": [_name_as_templates_do(message) for message in messages],
        "tools": tools and list(tools),
        "documents": None,
        "add_generation_prompt": False,
        **variables,
    }
    return json.loads(_to_json(all_variables))


def _render(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> str:
    source = get_chat_template(tokenizer, with_tools=variables["tools"] is not None)
    all_variables = {**_name_special_tokens(tokenizer), **variables}
    try:
        return _compile(source).render(all_variables)
    # It is a program of someone else's: it may raise anything.
    except Exception as error:
        message = f"the chat template cannot write this conversation: {error}"
        fix = "change the messages to suit the template, or the template"
        raise MaxlmError(message, fix=fix) from error


def _disarm(
    tokenizer: Tokenizer, messages: Sequence[Message], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], str, str, str]:
    """A template's variables, with a character, the mark, within each literal of a
    special token; the mark; and two more characters that occur nowhere either."""
    variables = _make_template_variables(messages, **settings)
    mark, start, end = _find_unused_chars(_to_json(variables), 3)
    literals, first_chars, beginnings = _list_literals(tokenizer)

    def disarm(string: str) -> str:
        if any(char in string for char in first_chars):
            for literal in literals:
                string = string.replace(literal, literal[:1] + mark + literal[1:])
        # A literal must not come about either where the template joins two strings, or
        # trims them. Words are what templates ask for, such as roles.
        stop = len(string.rstrip())
        if string.isidentifier() or not string.endswith(beginnings, 0, stop):
            return string
        return string[:stop] + mark + string[stop:]

    disarmed = _map_strings(variables, disarm)
    assert isinstance(disarmed, dict)
    return disarmed, mark, start, end


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
        char_escapes = _ESCAPE.findall(_escape_as_json(char))
        if char not in chars and not escapes.issuperset(char_escapes):
            unused.append(char)
            if len(unused) == count:
                return unused
    raise MaxlmError(
        "the conversation has every character from U+FDD0 on; three must be left to "
        "mark literals of special tokens with",
        where="messages",
        fix="leave noncharacters such as U+FDD0 to U+FDD2 out",
    )


@lru_cache(maxsize=8)
def _list_literals(tokenizer: Tokenizer) -> tuple[list[str], set[str], tuple[str, ...]]:
    """Literals of special tokens, their first characters, and all their beginnings."""
    literals = list(tokenizer.special.ids)
    first_chars = {literal[:1] for literal in literals}
    beginnings = {
        literal[:length] for literal in literals for length in range(1, len(literal))
    }
    return literals, first_chars, tuple(beginnings)


def _escape_as_json(char: str) -> str:
    """A character as a template's `tojson(ensure_ascii=True)` writes it."""
    return json.dumps(char)[1:-1]


def _name_as_templates_do(message: Message) -> Message:
    """Returns a message without what is None, its reasoning under all of transformers'
    names."""
    fields = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in fields:
            reasoning = fields[name]
            return {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


def _to_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    # What json raises of values that are not plain data.
    except (TypeError, ValueError, RecursionError) as error:
        message = f"a conversation must be plain data: {error}"
        fix = "give str, numbers, lists and mappings"
        raise MaxlmError(message, where="messages", fix=fix) from error


def _map_strings(value: object, change: Callable[[str], str]) -> object:
    """Plain data with other strings, keys of mappings too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            change(name): _map_strings(child, change) for name, child in value.items()
        }
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
    extra_files = tokenizer.extra_files
    if _TEMPLATE_FILE in extra_files:
        source = extra_files[_TEMPLATE_FILE].decode()
        for name, template in _TEMPLATES.items():
            if template == source:
                return name, source  # One of ours, as `tokenizer.chat` names it.
        return _TEMPLATE_FILE, source
    for file in ("chat_template.json", "tokenizer_config.json"):
        template = _read_json(extra_files.get(file, b"{}")).get("chat_template")
        if isinstance(template, list):  # several, by name
            source_by_name = {entry["name"]: entry["template"] for entry in template}
            names = ("tool_use", "default") if with_tools else ("default",)
            for name in names:
                if source_by_name.get(name):
                    return f"{name} of {file}", source_by_name[name]
        elif template:
            return file, template
    message = "the tokenizer carries no chat template"
    fix = (
        "set tokenizer.chat, import one that has a template, or give --chat-template "
        "FILE"
    )
    raise MaxlmError(message, where=_TEMPLATE_FILE, fix=fix)


@lru_cache(maxsize=16)  # These files are long, and every text needs them.
def _read_json(data: bytes) -> Mapping[str, Any]:
    values = parse_json(data, "the tokenizer's settings", "import the tokenizer again")
    return values if isinstance(values, dict) else {}


def _name_special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
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
def _compile(source: str) -> "Template":
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
            start = nodes.Output([nodes.Name("_generation_start", "load")])
            end = nodes.Output([nodes.Name("_generation_end", "load")])
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
