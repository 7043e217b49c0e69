"""Outputs of sequences: their tokens' text, log-probabilities, and what ends them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from maxlm.data.tokenizer import StreamDecoder, Tokenizer
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
        found = [(self._held.find(stop), stop) for stop in self._stop_strings]
        found = [(place, stop) for place, stop in found if place >= 0]
        if found:
            place, stop = min(found)
            text = self._held[:place]
            self._held = ""
            return text, stop
        begun = (count_begun(self._held, stop) for stop in self._stop_strings)
        kept = 0 if at_end else max(begun, default=0)
        final = len(self._held) - kept
        text, self._held = self._held[:final], self._held[final:]
        return text, None


def count_begun(text: str, stop: str) -> int:
    """Counts the characters at a text's end that may be the beginning of a stop
    string."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


@dataclass(eq=False)
class _Output:
    """A sequence's output so far."""

    text: TextStream | None
    prompt_logprobs: list[TokenLogprob] | None = None
    started: bool = False


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
        self.num_prompt_tokens = self.num_cached_tokens = self.num_generated_tokens = 0
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
        made = {each: _Output(None, started=True) for each in sequences}
        outputs = (made | self._outputs).items()
        self._outputs = {each: own for each, own in outputs if each.state != "finished"}

    def forget(self, sequence: RunningSequence) -> None:
        self._outputs.pop(sequence, None)
        self.matchers.pop(sequence, None)

    def take(
        self, sequence: RunningSequence, tokens: Sequence[TokenLogprob]
    ) -> SequenceOutput:
        """Makes the output of a sequence's new tokens, up to the one that ends it."""
        request = sequence.request
        own = self._outputs[sequence]
        taken = SequenceOutput(request.request_id, sequence.index, [])
        if not own.started:
            own.started = True
            num_virtual = sequence.num_virtual_tokens
            taken.num_cached_tokens = max(0, sequence.num_cached_tokens - num_virtual)
            if request.prompt_logprobs is not None:
                taken.prompt_logprobs = own.prompt_logprobs or []
            self.num_prompt_tokens += sequence.num_prompt_tokens - num_virtual
            self.num_cached_tokens += taken.num_cached_tokens
        left = sequence.num_tokens_left
        text = []
        for token in tokens:
            taken.token_ids.append(token.token_id)
            if request.top_logprobs is not None:
                taken.logprobs.append(
                    token._replace(top=token.top[: request.top_logprobs])
                )
            if token.token_id in sequence.stop_ids:
                taken.finish_reason = "stop"
                taken.stop_match = token.token_id
                break
            matcher = self.matchers.get(sequence)
            if matcher is not None:
                matcher.accept(token.token_id)
            if own.text is not None:
                piece, taken.stop_match = own.text.push(token.token_id)
                text.append(piece)
                if taken.stop_match is not None:
                    taken.finish_reason = "stop"
                    break
            if matcher is not None and matcher.is_finished:
                taken.finish_reason = "stop" if matcher.error is None else "abort"
                break
            if len(taken.token_ids) == left:
                taken.finish_reason = "length"
                break
        if (
            taken.finish_reason
            and own.text is not None
            and not isinstance(taken.stop_match, str)
        ):
            piece, stop = own.text.flush()
            text.append(piece)
            if stop is not None:
                taken.finish_reason = "stop"
                taken.stop_match = stop
        taken.text = "".join(text)
        if not request.continuations:  # their tokens are given
            self.num_generated_tokens += len(taken.token_ids)
        return taken

    def take_prompt(self, chunk: PrefillChunk, tokens: Sequence[TokenLogprob]) -> None:
        """Keeps log-probabilities of a prompt's tokens for its first output."""
        own = self._outputs[chunk.sequence]
        count = chunk.sequence.request.prompt_logprobs
        if own.started:
            return  # computed again after a preemption
        if own.prompt_logprobs is None or chunk.start < chunk.sequence.logprobs_start:
            own.prompt_logprobs = []
        own.prompt_logprobs += [
            token._replace(top=token.top[:count]) for token in tokens
        ]
