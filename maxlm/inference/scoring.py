"""Log-likelihoods of texts behind others, by the engine.

What texts share is computed once: a context by all of its continuations, and the beginning of
several contexts (examples before a question) in whole pages, while the cache has room.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from maxlm.config import MaxlmError
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.inference.sampling import SamplingConfig
from maxlm.models.architectures import EncoderDecoder

Tokens = Sequence[int]


class ContinuationScore(NamedTuple):
    """How likely a continuation is."""

    logprob: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest in its place."""
    token_logprobs: tuple[float, ...]
    """Log-probability of each token, in nats."""


class Scorer:
    """Scores continuations with an engine that does nothing else meanwhile."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._num_calls = 0

    def score(
        self,
        pairs: Sequence[tuple[Tokens, Tokens]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[ContinuationScore]:
        """Scores pairs of context and continuation, in their order.

        Args:
            pairs: token ids; no context and no continuation is empty. A context too long loses its
                first tokens.
            on_progress: is told how many pairs are done.

        Raises:
            MaxlmError: a continuation that is longer than the engine's longest sequence.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, pair in enumerate(pairs):
            groups.setdefault(self._cut_context(*pair), []).append(index)
        self._num_calls += 1
        # Contexts that begin alike come one after the other, the next ones from the end.
        waiting = sorted(groups, reverse=True)
        running: dict[str, list[int]] = {}
        scores: dict[int, ContinuationScore] = {}
        engine, room = self.engine, 2 * self.engine.config.max_sequences * self.engine.num_shards
        while waiting or running:
            while waiting and sum(map(len, running.values())) < room:
                context = waiting.pop()
                name, own = f"score-{self._num_calls}-{len(waiting)}", groups[context]
                running[name] = own
                engine.add_request(make_score_request(name, context, [pairs[i][1] for i in own]))
            for output in engine.step():
                place = output.sequence_index
                index = running[output.request_id][place]
                scores[index] = read_score(output, pairs[index][1])
                if all(i in scores for i in running[output.request_id]):
                    del running[output.request_id]
            if on_progress is not None:
                on_progress(len(scores))
        return [scores[index] for index in range(len(pairs))]

    def _cut_context(self, context: Tokens, continuation: Tokens) -> tuple[int, ...]:
        longest = self.engine.config.max_length
        if len(continuation) > longest:
            what = f"a continuation has {len(continuation):,} tokens; the longest sequence has "
            what += f"{longest:,} (max_length)"
            raise MaxlmError(what, fix="score it in parts")
        # The last token is looked up, never read. An encoder reads contexts apart from it.
        behind = 0 if isinstance(self.engine.model, EncoderDecoder) else len(continuation) - 1
        return tuple(context[behind - longest :])


def make_score_request(
    request_id: str, context: Tokens, continuations: Sequence[Tokens]
) -> GenerationRequest:
    """Makes the request that scores continuations of a context; :func:`read_score` reads each
    sequence's output."""
    return GenerationRequest(
        request_id,
        tuple(context),
        SamplingConfig(temperature=0, max_new_tokens=1),
        len(continuations),
        tuple(map(tuple, continuations)),
        top_logprobs=1,
        prompt_logprobs=1,
    )


def read_score(output: SequenceOutput, continuation: Tokens) -> ContinuationScore:
    """Returns the score of a continuation that the engine has read."""
    entries = [*(output.prompt_logprobs or ()), *output.logprobs]
    assert [entry.token_id for entry in entries] == [*continuation]
    logprobs = tuple(entry.logprob for entry in entries)
    is_greedy = all(entry.token_id == entry.top[0][0] for entry in entries)
    return ContinuationScore(sum(logprobs), is_greedy, logprobs)
