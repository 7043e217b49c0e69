"""Best of N samples: by their scores, or by how many, or how good ones, give the same
answer."""

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest, GrammarSpec
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


class SampleOptions(TypedDict, total=False):
    """Further fields of each sample's
    :class:`~maxlm.inference.requests.GenerationRequest`."""

    stop_strings: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    grammar: GrammarSpec | None
    banned_sequences: tuple[tuple[int, ...], ...]
    top_logprobs: int | None
    adapter: str | None


def best_of_n(
    engine: Engine,
    prompt: Sequence[int],
    num_samples: int,
    sampling: SamplingConfig,
    scorer: Scorer = score_mean_logprob,
    parse_answer: AnswerParser | None = None,
    *,
    budget: int | None = None,
    **options: Unpack[SampleOptions],
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
        options: further fields of each sample's request.

    Raises:
        MaxlmError: the budget is less than the longest sample, the samples would be all
            alike, or scores that are added are below 0.
    """
    check_samples_differ(sampling, num_samples)
    longest = sampling.max_new_tokens
    spent = TokenBudget(budget)
    if not spent.allows(longest):
        message = (
            f"a budget of {budget} tokens is less than one sample's "
            f"max_new_tokens={longest}"
        )
        fix = "raise it, or ask for shorter samples"
        raise MaxlmError(message, where="budget", fix=fix)
    # A continuation's log-probability is the sum of its tokens', which must be asked
    # for.
    options.setdefault("top_logprobs", 0)
    requests = [
        GenerationRequest(
            f"sample {index}",
            tuple(prompt),
            with_own_seed(sampling, index, max_new_tokens=longest),
            **options,
        )
        for index in range(num_samples)
    ]
    drawn = draw_continuations(engine, requests, spent)
    samples = [sample for sample in drawn if sample is not None]
    outputs = score_outputs(scorer, prompt, samples)
    if parse_answer is None:
        return DecodingResult(rank_outputs(outputs), spent.num_spent)
    answers = [parse_answer(output.text) for output in outputs]
    answer, outputs = rank_by_answer(outputs, answers)
    return DecodingResult(outputs, spent.num_spent, answer)


def self_consistency(
    engine: Engine,
    prompt: Sequence[int],
    num_samples: int,
    sampling: SamplingConfig,
    parse_answer: AnswerParser,
    *,
    budget: int | None = None,
    **options: Unpack[SampleOptions],
) -> DecodingResult:
    """Draws samples, and takes the answer that most of them give, of equal ones the
    first (Wang et al. 2023, arXiv 2203.11171). Arguments and errors are those of
    :func:`best_of_n`."""

    def score(prompt: Sequence[int], outputs: Sequence[Continuation]) -> list[float]:
        return [1.0] * len(outputs)

    return best_of_n(
        engine,
        prompt,
        num_samples,
        sampling,
        score,
        parse_answer,
        budget=budget,
        **options,
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
            message = (
                f"a score of {output.score:g}, where the scores of equal answers are "
                "added"
            )
            fix = "return 0 or more, such as a probability"
            raise MaxlmError(message, where="scorer", fix=fix)
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + output.score
    best_first: list[str | None] = []
    best_first += sorted(sums, key=lambda answer: sums[answer], reverse=True)
    best_first.append(None)

    def rank(index: int) -> tuple[int, float]:
        return best_first.index(answers[index]), -outputs[index].score

    ranked = [outputs[index] for index in sorted(range(len(outputs)), key=rank)]
    return best_first[0], ranked
