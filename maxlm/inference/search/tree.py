"""Diverse verifier tree search (Beeching, Tunstall and Rush 2024, "Scaling test-time
compute with open models")."""

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest
from maxlm.inference.search.continuations import (
    Continuation,
    DecodingResult,
    Scorer,
    TokenBudget,
    check_samples_differ,
    decode_text,
    draw_continuations,
    rank_outputs,
    score_outputs,
    with_own_seed,
)
from maxlm.models.architectures.encoder_decoder import EncoderDecoder


class TreeSearchConfig(Config):
    """Settings of diverse verifier tree search."""

    num_subtrees: int = Field(default=4, gt=0)
    """Paths that go on side by side; none takes another's place, so that they stay
    diverse."""
    beam_width: int = Field(default=4, gt=0)
    """Samples of each path's next step, of which the one with the best score is
    kept."""
    max_steps: int = Field(default=40, gt=0)
    """Steps of a path; the last one goes on to the output's end."""
    max_step_tokens: int = Field(default=512, gt=0)
    """Tokens at which a step ends without its delimiter."""
    step_delimiters: tuple[str, ...] = ("\n\n",)
    """Texts that end a step, and belong to it."""
    step_token_ids: tuple[int, ...] = ()
    """Tokens that end a step."""


def diverse_verifier_tree_search(
    engine: Engine,
    prompt: Sequence[int],
    scorer: Scorer,
    config: TreeSearchConfig,
    sampling: SamplingConfig,
    *,
    budget: int | None = None,
) -> DecodingResult:
    """Continues a prompt by several independent paths, step by step: draws
    ``beam_width`` next steps of each path, and keeps the one that the scorer likes
    best.

    Args:
        prompt: token ids.
        scorer: scores outputs up to the end of their last step, all paths' together.
        sampling: ``max_new_tokens`` counts a whole output.
        budget: tokens that all steps may have. Steps that do not surely fit are not
            drawn, and the search ends.

    Returns:
        All continuations of each path's last step, by score.

    Raises:
        MaxlmError: the budget has no room for a step, or the samples would be all
            alike.
    """
    if isinstance(engine.model, EncoderDecoder):
        what = "a model with an encoder does not go on from a step of its own"
        raise MaxlmError(
            what, where="tree search", fix="use a decoder, or another search"
        )
    check_samples_differ(sampling, config.num_subtrees * config.beam_width)

    def make_request(path: Continuation, *place: int) -> GenerationRequest:
        most = sampling.max_new_tokens - len(path.token_ids)
        is_last = place[0] == last_step
        most = most if is_last else min(most, config.max_step_tokens)
        return GenerationRequest(
            f"step {place}",
            (*prompt, *path.token_ids),
            with_own_seed(sampling, *place, max_new_tokens=most),
            stop_strings=() if is_last else config.step_delimiters,
            stop_token_ids=() if is_last else config.step_token_ids,
            top_logprobs=0,
        )

    def join(path: Continuation, step: Continuation) -> Continuation:
        """Returns the path with one more step."""
        tokens = (*path.token_ids, *step.token_ids)
        reason = step.finish_reason
        if reason == "length" or step.stop_match in delimiters:
            reason = "length" if len(tokens) == sampling.max_new_tokens else None
        stop = step.stop_match if reason == "stop" else None
        whole = Continuation(
            tokens, path.logprob + step.logprob, "", reason, stop_match=stop
        )
        return replace(whole, text=decode_text(engine, prompt, whole))

    delimiters = (*config.step_delimiters, *config.step_token_ids)
    spent = TokenBudget(budget)
    last_step = config.max_steps - 1
    paths = [Continuation((), 0.0)] * config.num_subtrees
    expanded: dict[int, list[Continuation]] = {}
    for step in range(config.max_steps):
        live = [i for i, path in enumerate(paths) if path.finish_reason is None]
        if not live:
            break
        # Every path's first sample before any one's second: a small budget serves all
        # alike.
        places = [(i, sample) for sample in range(config.beam_width) for i in live]
        requests = [make_request(paths[i], step, i, sample) for i, sample in places]
        drawn = draw_continuations(engine, requests, spent)
        children = [
            (i, join(paths[i], each))
            for (i, _), each in zip(places, drawn, strict=True)
            if each is not None
        ]
        if children:
            scored = score_outputs(scorer, prompt, [child for _, child in children])
            for i in {i for i, _ in children}:
                own = [
                    each
                    for (j, _), each in zip(children, scored, strict=True)
                    if j == i
                ]
                expanded[i], paths[i] = own, rank_outputs(own)[0]
        if len(children) < len(places):
            break
    if not expanded:
        what = f"a budget of {budget} tokens has no room for a step"
        raise MaxlmError(what, where="budget", fix="raise it, or lower max_step_tokens")
    outputs = [each for i in sorted(expanded) for each in expanded[i]]
    return DecodingResult(rank_outputs(outputs), spent.num_spent)
