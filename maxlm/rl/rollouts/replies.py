"""What stands between two turns of the policy, as tokens.

The policy goes on from the tokens that it drew: they are never decoded and encoded
again, which gives other tokens wherever it wrote a word in other pieces than the
tokenizer would. Only what follows its turn is encoded: the end of the turn, unless the
policy drew it; the environment's message; and what opens the next turn.
"""

from collections.abc import Sequence
from typing import NamedTuple

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.chat import (
    Message,
    TemplateVariable,
    render_chat,
    render_escaped_chat,
)
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.rl.environments.environment import Environment, Reply
from maxlm.rl.samples import Sample

# Where text goes on behind other text, for tokenizers that treat its beginning
# otherwise.
_CONTEXT = "\n"


def encode_reply(
    environment: Environment, tokenizer: Tokenizer, sample: Sample, reply: Reply
) -> list[int]:
    """Returns the tokens that follow a sample's last turn, which is the policy's: up to
    where the policy goes on. Raises MaxlmError: a chat template that cannot write the
    conversation.

    In a chat the turn's end is among them if the policy did not draw it (a stop string
    ended the turn). Any token that ends turns counts as the one that the template
    writes: Llama 3 ends a call by another than an answer.
    """
    row = sample.prompt.row
    messages = environment.make_messages(row)
    if messages is None:
        return _encode_text_behind(tokenizer, reply.text)
    variables = environment.read_template_variables(row)
    # Of the last turn only what follows it matters.
    earlier_turns = [
        {"role": role, "content": text} for role, text in sample.turns[:-1]
    ]
    history = [*messages, *earlier_turns]
    tail = _render_tail(
        tokenizer, history, [{"role": reply.role, "content": reply.text}], variables
    )
    tokens = tail.encode(tokenizer)
    if sample.tokens[-1] not in tokenizer.stop_ids:
        return tokens
    if tokens[0] in tokenizer.stop_ids:
        return tokens[1:]
    # Some templates write more behind a turn's text before they end it.
    end = _render_tail(tokenizer, history, [], variables).encode(tokenizer)
    num_drawn = _find_turn_end(tokenizer, end)
    if tokens[:num_drawn] != end[:num_drawn]:
        raise _make_template_error("ends a turn otherwise once others follow")
    return tokens[num_drawn:]


def check_template_keeps_turns(environment: Environment, tokenizer: Tokenizer) -> None:
    """Checks that the chat template writes an earlier turn of the policy as it drew it,
    once a reply of the environment follows. Raises MaxlmError: it drops or rewrites
    turns, or their thinking, and ``rewritten_turns`` is ``refuse``."""
    if environment.rewritten_turns == "keep_drawn":
        return
    question = {"role": "user", "content": "question"}
    reply = {"role": environment.reply_role, "content": "reply"}
    variables = environment.template_variables
    opening = render_chat(
        tokenizer, [question], **{**variables, "add_generation_prompt": True}
    )
    for thinking in ("", "<think>\nthinking\n</think>\n\n"):
        turn = f"{thinking}answer"
        answer = {"role": "assistant", "content": turn}
        text = render_chat(tokenizer, [question, answer, reply], **variables)
        if not text.startswith(opening + turn):
            message = (
                f"the chat template writes an earlier turn {turn!r} otherwise than the "
                f"policy drew it, once a message of role {reply['role']!r} follows"
            )
            fix = (
                "use a template that keeps turns, or set "
                "environment.rewritten_turns=keep_drawn"
            )
            raise MaxlmError(message, where="environment.rewritten_turns", fix=fix)


class _Tail(NamedTuple):
    """A rendered conversation, cut behind the policy's turn."""

    before: str
    text: str
    escape_char: str | None

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        if tokenizer.lossless:  # What a text is encoded as depends on no other.
            return tokenizer.encode_with_escapes(self.text, self.escape_char)
        before = tokenizer.encode_with_escapes(self.before, self.escape_char)
        tokens = tokenizer.encode_with_escapes(
            self.before + self.text, self.escape_char
        )
        if tokens[: len(before)] != before:
            raise _make_template_error("lets a token cross the end of a turn")
        return tokens[len(before) :]


def _render_tail(
    tokenizer: Tokenizer,
    history: Sequence[Message],
    replies: Sequence[Message],
    variables: dict[str, TemplateVariable],
) -> _Tail:
    """Renders a conversation in which a turn of the policy follows ``history``, and
    ``replies`` follow it, with what opens the next turn if there are any."""
    # A turn that occurs nowhere else marks the place.
    turn = "qturn"
    while any(turn in str(message) for message in (*history, *replies)):
        turn += "n"
    turn = f"{turn}."
    messages = [*history, {"role": "assistant", "content": turn}, *replies]
    chat = render_escaped_chat(
        tokenizer, messages, **{**variables, "add_generation_prompt": bool(replies)}
    )
    before, separator, text = chat.text.rpartition(turn)
    if not separator or turn in before:
        raise _make_template_error("drops a turn, or writes it more than once")
    return _Tail(before + turn, text, chat.escape_char)


def _find_turn_end(tokenizer: Tokenizer, end: Sequence[int]) -> int:
    """The place behind the first token that ends turns in what the template writes
    behind a turn; 0: there is none."""
    stop_ids = set(tokenizer.stop_ids)
    for place, token in enumerate(end):
        if token in stop_ids:
            return place + 1
    return 0


def _encode_text_behind(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a text that follows another, without special tokens."""
    if tokenizer.lossless:  # What a text is encoded as depends on no other.
        return tokenizer.encode(text)
    context = tokenizer.encode(_CONTEXT)
    tokens = tokenizer.encode(_CONTEXT + text)
    if tokens[: len(context)] != context:
        return tokenizer.encode(text)
    return tokens[len(context) :]


def _make_template_error(fault: str) -> MaxlmError:
    fix = "use another template, or an environment of one turn"
    return MaxlmError(f"the chat template {fault}", where="environment.chat", fix=fix)
