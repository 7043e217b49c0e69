"""Continuations that a search compares, and how they are drawn within a budget of
tokens."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import NamedTuple

import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine
from maxlm.inference.requests import FinishReason, GenerationRequest, SequenceOutput


@dataclass(frozen=True)
class Continuation:
    """A continuation of a prompt, whole or as far as a search has come."""

    token_ids: tuple[int, ...]
    logprob: float
    """Natural log-probability of all of them, by the model itself."""
    text: str = ""
    """"" where the engine has no tokenizer."""
    finish_reason: FinishReason | None = None
    """None: it is not finished."""
    score: float = 0.0
    stop_match: str | int | None = None
    """The stop string, or the token id, that ended it."""


class DecodingResult(NamedTuple):
    """Outcome of a search."""

    outputs: list[Continuation]
    """The best first."""
    num_tokens: int
    """Tokens generated, those of dropped continuations included: never more than the
    budget."""
    answer: str | None = None
    """The answer that won, where answers are compared."""


Scorer = Callable[[Sequence[int], Sequence[Continuation]], Sequence[float]]
"""Returns a number for each of a prompt's continuations; higher is better."""


@dataclass
class TokenBudget:
    """Tokens that a search may generate."""

    limit: int | None
    """None: no limit."""
    num_spent: int = 0

    def allows(self, num_tokens: int) -> bool:
        """Whether so many more may be generated."""
        return self.limit is None or self.num_spent + num_tokens <= self.limit


def score_mean_logprob(
    prompt: Sequence[int], outputs: Sequence[Continuation]
) -> list[float]:
    """Returns each continuation's mean log-probability per token."""
    return [output.logprob / max(1, len(output.token_ids)) for output in outputs]


def score_outputs(
    scorer: Scorer, prompt: Sequence[int], outputs: Sequence[Continuation]
) -> list[Continuation]:
    """Returns continuations with their scores. Raises MaxlmError: the scorer returns
    another number of scores, or no number."""
    scores = [float(score) for score in scorer(prompt, outputs)]
    if len(scores) != len(outputs) or any(map(isnan, scores)):
        message = f"{len(outputs)} continuations got the scores {scores}"
        raise MaxlmError(message, where="scorer", fix="return one number for each")
    return [
        replace(output, score=score)
        for output, score in zip(outputs, scores, strict=True)
    ]


def rank_outputs(outputs: Sequence[Continuation]) -> list[Continuation]:
    """Sorts by score, the best first, equal ones as they stand."""
    return sorted(outputs, key=lambda output: -output.score)


def with_own_seed(
    sampling: SamplingConfig, *place: int, max_new_tokens: int
) -> SamplingConfig:
    """Returns settings with the seed of one of a search's samples, and another
    length."""
    sequence = np.random.SeedSequence((sampling.seed, *place))
    seed = int(sequence.generate_state(1)[0])
    return sampling.model_copy(update={"seed": seed, "max_new_tokens": max_new_tokens})


def check_samples_differ(sampling: SamplingConfig, num_samples: int) -> None:
    """Checks that several samples are not all the same. Raises MaxlmError: temperature
    0, or fewer samples than one."""
    if num_samples < 1:
        message = f"{num_samples} samples"
        raise MaxlmError(message, where="search", fix="draw at least one")
    if sampling.temperature == 0 and num_samples > 1:
        message = f"{num_samples} samples at temperature 0 are all alike"
        fix = "set it above 0, or draw one"
        raise MaxlmError(message, where="temperature", fix=fix)


def claim_idle_engine(engine: Engine) -> None:
    """Checks that a search has the engine for itself, and drops outputs that wait
    there. Raises MaxlmError: other requests are there."""
    if engine.scheduler.running or engine.scheduler.waiting:
        message = "the engine has other requests, whose outputs a search would take"
        fix = "wait until they end, or use another engine"
        raise MaxlmError(message, where="search", fix=fix)
    # Outputs of aborted requests may be left, which the search would take for its own.
    while engine.has_work:
        engine.step()


def decode_text(engine: Engine, prompt: Sequence[int], output: Continuation) -> str:
    """Returns the text of an output but for the token that ends it; "" without a
    tokenizer."""
    if engine.tokenizer is None:
        return ""
    tokens = output.token_ids
    if tokens[-1] == output.stop_match:
        tokens = tokens[:-1]
    continued = engine.continues_text(prompt)
    text = engine.tokenizer.decode_bytes(tokens, continued=continued)
    return text.decode("utf-8", "replace")


def draw_continuations(
    engine: Engine, requests: Sequence[GenerationRequest], budget: TokenBudget
) -> list[Continuation | None]:
    """Runs requests of one sequence each, with ``top_logprobs``. One starts when the
    budget has room for the longest output that it and those that run may have. Returns
    each one's continuation; None: the budget had no room for it."""
    claim_idle_engine(engine)
    waiting = deque(requests)
    outputs: dict[str, SequenceOutput] = {}
    reserved: dict[str, int] = {}
    """Tokens that each running request may still generate."""
    try:
        while True:
            while waiting:
                max_new_tokens = waiting[0].sampling.max_new_tokens
                if not budget.allows(sum(reserved.values()) + max_new_tokens):
                    break
                request = waiting.popleft()
                engine.add_request(request)
                reserved[request.request_id] = max_new_tokens
            if not reserved:
                break
            for output in engine.step():
                request_id = output.request_id
                if request_id in outputs:
                    outputs[request_id].append(output)
                else:
                    outputs[request_id] = output
                num_tokens = len(output.token_ids)
                reserved[request_id] -= num_tokens
                budget.num_spent += num_tokens
                if output.finish_reason is not None:
                    del reserved[request_id]
    finally:
        for request_id in reserved:
            engine.abort(request_id)
    continuations: list[Continuation | None] = []
    for request in requests:
        output = outputs.get(request.request_id)
        continuations.append(None if output is None else _make_continuation(output))
    return continuations


def _make_continuation(output: SequenceOutput) -> Continuation:
    return Continuation(
        token_ids=tuple(output.token_ids),
        logprob=sum(token.logprob for token in output.logprobs),
        text=output.text,
        finish_reason=output.finish_reason,
        stop_match=output.stop_match,
    )
