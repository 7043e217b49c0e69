"""Outputs of sequences: their tokens' text, log-probabilities, and what ends them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from maxlm.data.tokenizer.codec import StreamDecoder, Tokenizer
from maxlm.inference.banned_sequences import TokenMatcher
from maxlm.inference.requests import SequenceOutput, TokenLogprob
from maxlm.inference.sequences import PrefillChunk, RunningSequence


class TextStream:
    """Turns a sequence's tokens into text as they come: whole characters, and nothing
    that may begin a stop string.

    Args:
        continued: whether the text follows other text, rather than opening a document.
        stop_strings: texts that end the output.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_strings: tuple[str, ...], *, continued: bool
    ):
        self._decoder = StreamDecoder(tokenizer, continued=continued)
        self._stop_strings = tuple(filter(None, stop_strings))
        self._held = ""

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Returns the text that is final with one more token, and the stop string that
        ends it."""
        return self._release(self._decoder.push(token_id), at_end=False)

    def flush(self) -> tuple[str, str | None]:
        """Returns the rest, when no token follows."""
        return self._release(self._decoder.flush(), at_end=True)

    def _release(self, text: str, *, at_end: bool) -> tuple[str, str | None]:
        self._held += text
        matches = [
            (self._held.index(stop), stop)
            for stop in self._stop_strings
            if stop in self._held
        ]
        if matches:
            # The first in the text; of two that begin together the first in the
            # alphabet.
            place, stop = min(matches)
            text = self._held[:place]
            self._held = ""
            return text, stop
        num_begun = 0
        if not at_end:
            for stop in self._stop_strings:
                num_begun = max(num_begun, count_begun(self._held, stop))
        num_final = len(self._held) - num_begun
        text = self._held[:num_final]
        self._held = self._held[num_final:]
        return text, None


def count_begun(text: str, stop: str) -> int:
    """Counts the characters at a text's end that may be the beginning of a stop
    string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


@dataclass(eq=False)
class _Output:
    """A sequence's output so far."""

    text: TextStream | None
    prompt_logprobs: list[TokenLogprob] | None = None
    started: bool = False
    num_routes: int = 0
    """Tokens whose experts have been handed out, virtual ones included."""


class OutputBuilder:
    """Builds the outputs of running sequences from the tokens that steps draw.

    Attributes:
        matchers: of sequences with a grammar or banned sequences.
        num_prompt_tokens, num_cached_tokens, num_generated_tokens: of all sequences so
            far.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer
        self.matchers: dict[RunningSequence, TokenMatcher] = {}
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self._outputs: dict[RunningSequence, _Output] = {}

    def add(
        self,
        sequence: RunningSequence,
        matcher: TokenMatcher | None,
        *,
        continued: bool,
    ) -> None:
        """Begins a sequence's output; ``continued``: its first word follows others."""
        text = None
        has_text = not (sequence.is_branching or sequence.request.continuations)
        if self.tokenizer is not None and has_text:
            text = TextStream(
                self.tokenizer, sequence.request.stop_strings, continued=continued
            )
        if matcher is not None:
            self.matchers[sequence] = matcher.copy()
        self._outputs[sequence] = _Output(text)

    def branch(self, sequences: Iterable[RunningSequence]) -> None:
        """Adds branches that have begun, and forgets sequences that none goes on
        from."""
        for sequence in sequences:
            # A branch that stays in place has an output already.
            self._outputs.setdefault(sequence, _Output(None, started=True))
        self._outputs = {
            sequence: output
            for sequence, output in self._outputs.items()
            if sequence.state != "finished"
        }

    def forget(self, sequence: RunningSequence) -> None:
        self._outputs.pop(sequence, None)
        self.matchers.pop(sequence, None)

    def take(
        self, sequence: RunningSequence, tokens: Sequence[TokenLogprob]
    ) -> SequenceOutput:
        """Makes the output of a sequence's new tokens, up to the one that ends it."""
        request = sequence.request
        so_far = self._outputs[sequence]
        output = SequenceOutput(request.request_id, sequence.index, [])
        if not so_far.started:
            so_far.started = True
            num_virtual = sequence.num_virtual_tokens
            output.num_cached_tokens = max(0, sequence.num_cached_tokens - num_virtual)
            if request.prompt_logprobs is not None:
                output.prompt_logprobs = so_far.prompt_logprobs or []
            self.num_prompt_tokens += sequence.num_prompt_tokens - num_virtual
            self.num_cached_tokens += output.num_cached_tokens
        matcher = self.matchers.get(sequence)
        stream = so_far.text
        pieces = []
        for token in tokens:
            output.token_ids.append(token.token_id)
            if request.top_logprobs is not None:
                top = token.top[: request.top_logprobs]
                output.logprobs.append(token._replace(top=top))
            if token.token_id in sequence.stop_ids:
                output.finish_reason = "stop"
                output.stop_match = token.token_id
                break
            if matcher is not None:
                matcher.accept(token.token_id)
            if stream is not None:
                piece, output.stop_match = stream.push(token.token_id)
                pieces.append(piece)
                if output.stop_match is not None:
                    output.finish_reason = "stop"
                    break
            if matcher is not None and matcher.is_finished:
                output.finish_reason = "stop" if matcher.error is None else "abort"
                break
            if len(output.token_ids) == sequence.num_tokens_left:
                output.finish_reason = "length"
                break
        has_stop_string = isinstance(output.stop_match, str)
        if output.finish_reason and stream is not None and not has_stop_string:
            # The last characters may complete a stop string.
            piece, stop = stream.flush()
            pieces.append(piece)
            if stop is not None:
                output.finish_reason = "stop"
                output.stop_match = stop
        output.text = "".join(pieces)
        if not request.continuations:  # their tokens are not generated
            self.num_generated_tokens += len(output.token_ids)
        return output

    def take_routes(self, sequence: RunningSequence) -> list[np.ndarray]:
        """Returns the experts [E, k] of each token that a sequence has read since they
        were last taken."""
        so_far = self._outputs[sequence]
        first = max(so_far.num_routes, sequence.num_virtual_tokens)
        so_far.num_routes = len(sequence.routes)
        return sequence.routes[first:]

    def take_prompt(self, chunk: PrefillChunk, tokens: Sequence[TokenLogprob]) -> None:
        """Keeps log-probabilities of a prompt's tokens for its first output."""
        sequence = chunk.sequence
        so_far = self._outputs[sequence]
        if so_far.started:
            return  # computed again after a preemption
        if so_far.prompt_logprobs is None or chunk.start < sequence.logprobs_start:
            so_far.prompt_logprobs = []
        num_top = sequence.request.prompt_logprobs
        so_far.prompt_logprobs += [
            token._replace(top=token.top[:num_top]) for token in tokens
        ]
