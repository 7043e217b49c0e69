"""A conversation in the terminal."""

import io
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.chat import encode_chat
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest

_HELP = """\
/reset       forget the conversation
/system TEXT change what comes before it, and forget it
/save FILE   write it as JSON
/help        show this
/quit        end, as Ctrl-D does; Ctrl-C stops an answer"""


class ChatSession:
    """A conversation with a model, message by message. Raises MaxlmError: the tokenizer
    has no chat template, or one that cannot write the system text.

    Args:
        engine: a ``maxlm.inference.engine.Engine`` with a tokenizer, whose
            ``max_length`` is the most tokens of the conversation and an answer.
        sampling: max_new_tokens is a limit, beside the context's.
        system: text of a message of the system's, before all others.
    """

    def __init__(
        self, engine: Engine, sampling: SamplingConfig, system: str | None = None
    ):
        assert engine.tokenizer is not None
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._sampling = sampling
        self.system = system
        self._count = 0
        self.num_tokens = 0
        """Tokens of the last answer."""
        self.is_stopped = False
        """To set while an answer is written: it ends after its next token."""
        self.reset()
        encode_chat(
            self._tokenizer, [*self.messages, {"role": "user", "content": "Hello"}]
        )

    def reset(self) -> None:
        """Forgets the conversation, but for the system's text."""
        self.messages = (
            [{"role": "system", "content": self.system}] if self.system else []
        )

    def answer(self, text: str) -> Iterator[str]:
        """Yields the pieces of the answer to a message as they come; both join the
        conversation, the answer as far as it came. Raises MaxlmError: the conversation
        no longer fits the context; it stays as it was."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_chat(self._tokenizer, messages, add_generation_prompt=True)
        context = self._engine.config.max_length
        room = context - len(prompt)
        if room < 1:
            message = (
                f"the conversation has {len(prompt)} tokens, the context {context}"
            )
            raise MaxlmError(message, fix="/reset forgets it")
        # Each answer has draws of its own.
        seed = (self._sampling.seed + self._count) % 2**32
        max_new_tokens = min(self._sampling.max_new_tokens, room)
        sampling = self._sampling.model_copy(
            update={"max_new_tokens": max_new_tokens, "seed": seed}
        )
        self._count += 1
        self.is_stopped = False
        self.num_tokens = 0
        name = f"chat-{self._count}"
        pieces = []
        done = False
        self._engine.add_request(GenerationRequest(name, tuple(prompt), sampling))
        try:
            while not done and not self.is_stopped:
                for output in self._engine.step():
                    if output.request_id != name:  # the end of one that was stopped
                        continue
                    self.num_tokens += len(output.token_ids)
                    done = output.finish_reason is not None
                    pieces.append(output.text)
                    yield output.text
        finally:
            self._engine.abort(name)
            self.messages = [
                *messages,
                {"role": "assistant", "content": "".join(pieces)},
            ]


def run_chat(session: ChatSession) -> None:
    """Reads messages from standard input, and prints answers, until its end or
    /quit."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            # Stray bytes that are read, or characters that the terminal cannot show.
            stream.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history of input())
        print("Enter sends; /help lists commands.", file=sys.stderr)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            print("\n" if is_terminal else "", end="", file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)", file=sys.stderr)
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                print(_run_command(session, line), file=sys.stderr)
            elif line:
                _print_answer(session, line)
        except MaxlmError as error:
            print(f"error: {error}", file=sys.stderr)


def _run_command(session: ChatSession, line: str) -> str:
    name, _, rest = line.partition(" ")
    if name == "/help":
        return _HELP
    if name == "/reset":
        session.reset()
        return "the conversation is forgotten"
    if name == "/system" and rest.strip():
        session.system = rest.strip()
        session.reset()
        return "the system's text is set"
    if name == "/save" and rest.strip():
        path = Path(rest.strip()).expanduser()
        text = json.dumps(session.messages, indent=2, ensure_ascii=False) + "\n"
        try:
            path.write_text(text, "utf-8")
        except OSError as error:
            raise MaxlmError(
                f"cannot be written ({error.strerror})", where=str(path)
            ) from None
        return f"saved {len(session.messages)} messages in {path}"
    if f"\n{name} " in _HELP:
        message = f"{name} needs a word more"
    else:
        message = f"no command {line!r}"
    return f"{message}; /help lists commands"


def _print_answer(session: ChatSession, text: str) -> None:
    start = time.monotonic()
    first = None

    # Ctrl-C stops the answer: raised within a step, it would lose the engine's buffers.
    def stop(*_: object) -> None:
        session.is_stopped = True

    previous_handler = signal.signal(signal.SIGINT, stop)
    try:
        for piece in session.answer(text):
            first = first or time.monotonic()
            print(piece, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    print(flush=True)
    if first is not None:
        count = session.num_tokens
        seconds = max(time.monotonic() - first, 1e-9)
        rate = f"{(count - 1) / seconds:.1f} tokens/s"
        line = f"{count} tokens, {rate}, first after {first - start:.2f} s"
        if sys.stderr.isatty():
            line = f"\033[2m{line}\033[0m"  # dim
        print(line, file=sys.stderr, flush=True)
