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
        what = f"{len(outputs)} continuations got the scores {scores}"
        raise MaxlmError(what, where="scorer", fix="return one number for each")
    return [
        replace(each, score=score) for each, score in zip(outputs, scores, strict=True)
    ]


def rank_outputs(outputs: Sequence[Continuation]) -> list[Continuation]:
    """Sorts by score, the best first, equal ones as they stand."""
    return sorted(outputs, key=lambda output: -output.score)


def with_own_seed(
    sampling: SamplingConfig, *place: int, max_new_tokens: int
) -> SamplingConfig:
    """Returns settings with the seed of one of a search's samples, and another
    length."""
    seed = int(np.random.SeedSequence((sampling.seed, *place)).generate_state(1)[0])
    return sampling.model_copy(update={"seed": seed, "max_new_tokens": max_new_tokens})


def check_samples_differ(sampling: SamplingConfig, num_samples: int) -> None:
    """Checks that several samples are not all the same. Raises MaxlmError: temperature
    0, or fewer samples than one."""
    if num_samples < 1:
        raise MaxlmError(
            f"{num_samples} samples", where="search", fix="draw at least one"
        )
    if sampling.temperature == 0 and num_samples > 1:
        what = f"{num_samples} samples at temperature 0 are all alike"
        raise MaxlmError(what, where="temperature", fix="set it above 0, or draw one")


def require_idle(engine: Engine) -> None:
    """Checks that a search has the engine for itself, and drops outputs that wait
    there. Raises MaxlmError: other requests are there."""
    if engine.scheduler.running or engine.scheduler.waiting:
        what = "the engine has other requests, whose outputs a search would take"
        raise MaxlmError(
            what, where="search", fix="wait until they end, or use another engine"
        )
    while engine.has_work:
        engine.step()  # outputs of aborted requests


def decode_text(engine: Engine, prompt: Sequence[int], output: Continuation) -> str:
    """Returns the text of an output but for the token that ends it; "" without a
    tokenizer."""
    if engine.tokenizer is None:
        return ""
    tokens = output.token_ids[
        : -1 if output.token_ids[-1] == output.stop_match else None
    ]
    continued = engine.continues_text(prompt)
    return engine.tokenizer.decode_bytes(tokens, continued=continued).decode(
        "utf-8", "replace"
    )


def draw_continuations(
    engine: Engine, requests: Sequence[GenerationRequest], budget: TokenBudget
) -> list[Continuation | None]:
    """Runs requests of one sequence each, with ``top_logprobs``. One starts when the
    budget has room for the longest output that it and those that run may have. Returns
    each one's continuation; None: the budget had no room for it."""
    require_idle(engine)
    waiting = deque(requests)
    found = dict[str, SequenceOutput]()
    reserved: dict[str, int] = {}  # tokens that those which run may still generate
    try:
        while True:
            while waiting:
                most = waiting[0].sampling.max_new_tokens
                if not budget.allows(sum(reserved.values()) + most):
                    break
                request = waiting.popleft()
                engine.add_request(request)
                reserved[request.request_id] = most
            if not reserved:
                return [
                    _make_continuation(found.get(each.request_id)) for each in requests
                ]
            for output in engine.step():
                name = output.request_id
                count = len(output.token_ids)
                own = found.setdefault(name, output)
                if own is not output:
                    own.append(output)
                reserved[name] -= count
                budget.num_spent += count
                if output.finish_reason is not None:
                    del reserved[name]
    finally:
        for request_id in reserved:
            engine.abort(request_id)


def _make_continuation(output: SequenceOutput | None) -> Continuation | None:
    if output is None:
        return None
    logprob = sum(token.logprob for token in output.logprobs)
    ids = tuple(output.token_ids)
    reason, stop_match = output.finish_reason, output.stop_match
    return Continuation(ids, logprob, output.text, reason, stop_match=stop_match)
