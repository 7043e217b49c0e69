"""Best of N samples: by their scores, or by how many, or how good ones, give the same
answer."""

from collections.abc import Callable, Sequence
from typing import Any

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.search.continuations import (
    Continuation,
    DecodingResult,
    Scorer,
    TokenBudget,
    check_samples_differ,
    draw_continuations,
    rank_outputs,
    score_mean_logprob,
    score_outputs,
    with_own_seed,
)

AnswerParser = Callable[[str], str | None]
"""Returns the answer that a text gives; None: it gives none."""


def best_of_n(
    engine: Engine,
    prompt: Sequence[int],
    num_samples: int,
    sampling: SamplingConfig,
    scorer: Scorer = score_mean_logprob,
    parse_answer: AnswerParser | None = None,
    *,
    budget: int | None = None,
    **request: Any,
) -> DecodingResult:
    """Draws samples, and sorts them by their scores; with a parser by the sum of the
    scores of all that give the same answer first (weighted best of N, Li et al. 2023,
    arXiv 2206.02336).

    Args:
        prompt: token ids.
        sampling: of each sample; its seed gives each sample's own.
        scorer: with ``parse_answer`` returns scores of 0 or more, such as
            probabilities.
        budget: tokens that all samples may have; as many are drawn as surely fit.
        request: other fields of :class:`~maxlm.inference.requests.GenerationRequest`.

    Raises:
        MaxlmError: the budget is less than the longest sample, the samples would be all
            alike, or scores that are added are below 0.
    """
    check_samples_differ(sampling, num_samples)
    longest = sampling.max_new_tokens
    spent = TokenBudget(budget)
    if not spent.allows(longest):
        what = f"a budget of {budget} tokens is less than one sample's max_new_tokens={longest}"
        raise MaxlmError(
            what, where="budget", fix="raise it, or ask for shorter samples"
        )
    requests = [
        GenerationRequest(
            f"sample {index}",
            tuple(prompt),
            with_own_seed(sampling, index, max_new_tokens=longest),
            **{"top_logprobs": 0, **request},
        )
        for index in range(num_samples)
    ]
    drawn = draw_continuations(engine, requests, spent)
    outputs = score_outputs(
        scorer, prompt, [each for each in drawn if each is not None]
    )
    if parse_answer is None:
        return DecodingResult(rank_outputs(outputs), spent.num_spent)
    answer, outputs = rank_by_answer(
        outputs, [parse_answer(each.text) for each in outputs]
    )
    return DecodingResult(outputs, spent.num_spent, answer)


def self_consistency(
    engine: Engine,
    prompt: Sequence[int],
    num_samples: int,
    sampling: SamplingConfig,
    parse_answer: AnswerParser,
    **options: Any,
) -> DecodingResult:
    """Draws samples, and takes the answer that most of them give, of equal ones the
    first (Wang et al. 2023, arXiv 2203.11171). Arguments and errors are those of
    :func:`best_of_n`."""

    def score(prompt: Sequence[int], outputs: Sequence[Continuation]) -> list[float]:
        return [1.0] * len(outputs)

    return best_of_n(
        engine, prompt, num_samples, sampling, score, parse_answer, **options
    )


def rank_by_answer(
    outputs: Sequence[Continuation], answers: Sequence[str | None]
) -> tuple[str | None, list[Continuation]]:
    """Returns the answer with the highest sum of scores, and the outputs: those of this
    answer first, those without an answer last, and within an answer by score. Raises
    MaxlmError: a score is below 0: more of it would be worse."""
    sums: dict[str, float] = {}
    for output, answer in zip(outputs, answers, strict=True):
        if output.score < 0:
            what = f"a score of {output.score:g}, where the scores of equal answers are added"
            raise MaxlmError(
                what, where="scorer", fix="return 0 or more, such as a probability"
            )
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + output.score
    best_first: list[str | None] = [
        *sorted(sums, key=sums.__getitem__, reverse=True),
        None,
    ]
    order = sorted(
        range(len(outputs)),
        key=lambda i: (best_first.index(answers[i]), -outputs[i].score),
    )
    return best_first[0], [outputs[i] for i in order]
