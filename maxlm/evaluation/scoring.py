"""Log-likelihoods of continuations."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.sampling import SamplingConfig

TokenPair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context, and of what follows it."""


class ContinuationScore(NamedTuple):
    """How likely a continuation is."""

    logprob: float
    """Nats, summed over its tokens."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""


class Scorer:
    """Scores continuations with an engine."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def score(
        self, pairs: Sequence[TokenPair], on_progress: Callable[[int], None] | None = None
    ) -> list[ContinuationScore]:
        """Returns each pair's score; contexts must not be empty.

        Args:
            on_progress: called with the number of pairs that are done.
        """
        greedy = SamplingConfig(temperature=0, max_new_tokens=1)
        requests = [
            GenerationRequest(str(n), (*context, *tail), greedy, prompt_logprobs=1)
            for n, (context, tail) in enumerate(pairs)
        ]
        scores: dict[int, ContinuationScore] = {}
        for output in self._engine.run(requests):
            if output.prompt_logprobs is not None:
                number = int(output.request_id)
                start = len(output.prompt_logprobs) - len(pairs[number][1])
                tail = output.prompt_logprobs[start:]
                is_greedy = all(each.token_id == each.top[0][0] for each in tail)
                scores[number] = ContinuationScore(sum(e.logprob for e in tail), is_greedy)
                if on_progress is not None:
                    on_progress(len(scores))
        return [scores[number] for number in range(len(pairs))]
