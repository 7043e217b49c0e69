"""Beam search, with transformers' length penalty and its rules of ending."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from pydantic import Field

from maxlm.config import Config, MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest, TokenLogprob
from maxlm.inference.sampling import TOP_LOGPROBS
from maxlm.inference.search.continuations import (
    Continuation,
    DecodingResult,
    TokenBudget,
    decode_text,
    rank_outputs,
    require_idle,
)
from maxlm.models.architectures.encoder_decoder import EncoderDecoder


class BeamSearchConfig(Config):
    """Settings of beam search, as transformers' of these names."""

    num_beams: int = Field(default=4, gt=0)
    """Continuations that go on together."""
    length_penalty: float = Field(default=1.0, ge=-16, le=16)
    """A score is the log-probability divided by tokens ** this: above 0 favours long
    outputs, below 0 short ones."""
    early_stopping: bool | Literal["never"] = False
    """true: end at ``num_beams`` finished outputs; false: go on while the likeliest
    beam, if it ended now, would be better than the worst of them; never: while it could
    still become so."""
    max_new_tokens: int = Field(default=128, gt=0)
    """Tokens at which beams end; an end-of-text token ends them sooner."""
    num_return_sequences: int = Field(default=1, gt=0)
    """Outputs to return, at most ``num_beams``."""


def beam_search(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    config: BeamSearchConfig,
    *,
    stop_token_ids: Sequence[int] | None = None,
    budget: int | None = None,
) -> list[DecodingResult]:
    """Finds likely continuations of prompts, several prompts at once where the engine
    has room. Of equally likely ones that of the better beam goes first, then the lower
    token id.

    Args:
        prompts: token ids of each.
        stop_token_ids: tokens that end an output; default: the tokenizer's.
        budget: tokens that the beams of one prompt may generate. Where the next step
            would exceed it, outputs end as at ``max_new_tokens``.

    Returns:
        Of each prompt; an output's ``score`` is its log-probability with the length
        penalty.

    Raises:
        MaxlmError: the engine has no room for one prompt's beams, or has other
            requests.
    """
    if stop_token_ids is None:
        stop_token_ids = () if engine.tokenizer is None else engine.tokenizer.stop_ids
    stops = frozenset(stop_token_ids)
    check_beam_search(engine.vocab_size, config, stops)
    if budget is not None and budget < 1:
        raise MaxlmError(
            f"a budget of {budget} tokens", where="budget", fix="allow at least 1"
        )
    require_idle(engine)
    sampling = SamplingConfig(temperature=0, max_new_tokens=config.max_new_tokens)
    requests = [
        GenerationRequest(
            str(n), tuple(p), sampling, ignore_eos=True, top_logprobs=TOP_LOGPROBS
        )
        for n, p in enumerate(prompts)
    ]
    room, num_beams = engine.scheduler.config, config.num_beams
    most_pages = room.num_pages or room.max_sequences * room.pages_per_sequence + 1
    num_pages = {
        each.request_id: _count_pages(engine, each, num_beams) for each in requests
    }
    waiting = deque(requests)
    running = dict[str, BeamSearch]()
    results = dict[str, DecodingResult]()
    try:
        while waiting or running:
            # All searches have rows and pages to the end: a beam that is preempted
            # would fall behind the others.
            while waiting and (len(running) + 1) * num_beams <= room.max_sequences:
                request_id = waiting[0].request_id
                if (
                    sum(num_pages[each] for each in (request_id, *running))
                    >= most_pages
                ):
                    break
                engine.add_request(waiting.popleft(), branching=True)
                running[request_id] = BeamSearch(config, stops, TokenBudget(budget))
            if not running:
                what = f"{num_beams} beams need more rows or pages than the engine has"
                raise MaxlmError(
                    what, where="num_beams", fix="raise max_sequences or num_pages"
                )
            tokens = defaultdict[str, dict[int, TokenLogprob]](dict)
            for output in engine.step():
                tokens[output.request_id][output.sequence_index] = output.logprobs[0]
            for request_id, found in tokens.items():
                search = running[request_id]
                beams = search.advance(found)
                branches = [(beam.index, beam.tokens[-1]) for beam in beams]
                indices = engine.branch(request_id, branches)
                search.beams = [
                    b._replace(index=i) for b, i in zip(beams, indices, strict=True)
                ]
                if not beams:
                    del running[request_id]
                    outputs = [
                        replace(
                            each,
                            text=decode_text(engine, prompts[int(request_id)], each),
                        )
                        for each in search.finished[: config.num_return_sequences]
                    ]
                    results[request_id] = DecodingResult(
                        outputs, search.budget.num_spent
                    )
    finally:
        for request_id in running:
            engine.abort(request_id)
    return [results[request.request_id] for request in requests]


class Beam(NamedTuple):
    """A continuation that goes on."""

    index: int
    """Which of the request's sequences it is, or goes on from."""
    tokens: tuple[int, ...]
    logprob: float


@dataclass
class BeamSearch:
    """Search of one prompt's continuations, from one token of all beams to the next."""

    config: BeamSearchConfig
    stops: frozenset[int]
    budget: TokenBudget
    beams: list[Beam] = field(default_factory=lambda: [Beam(0, (), 0.0)])
    finished: list[Continuation] = field(default_factory=list)
    """The best so far, at most ``num_beams``, the best first."""

    def advance(self, tokens: Mapping[int, TokenLogprob]) -> list[Beam]:
        """Takes the likeliest tokens behind each beam, by its index; returns the beams
        that go on, none at the end."""
        config = self.config
        length = len(self.beams[0].tokens) + 1
        self.budget.num_spent += len(self.beams)
        extended = [
            Beam(beam.index, (*beam.tokens, token), beam.logprob + logprob)
            for beam in self.beams
            for token, logprob in tokens[beam.index].top
        ]
        extended.sort(key=lambda beam: -beam.logprob)
        beams = [beam for beam in extended if beam.tokens[-1] not in self.stops][
            : config.num_beams
        ]
        at_end = length == config.max_new_tokens or not self.budget.allows(len(beams))
        for _, ids, logprob in extended[: config.num_beams]:
            stop = ids[-1] if ids[-1] in self.stops else None
            if at_end or stop is not None:
                reason = "length" if stop is None else "stop"
                score = self._score(logprob, length)
                self.finished.append(
                    Continuation(ids, logprob, "", reason, score, stop)
                )
        self.finished = rank_outputs(self.finished)[: config.num_beams]
        return [] if at_end or self._is_done(beams, length) else beams

    def _is_done(self, beams: list[Beam], length: int) -> bool:
        config = self.config
        if not beams or len(self.finished) < config.num_beams:
            return not beams
        if config.early_stopping is True:
            return True
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = config.max_new_tokens
        return self._score(beams[0].logprob, length) <= self.finished[-1].score

    def _score(self, logprob: float, length: int) -> float:
        return logprob / length**self.config.length_penalty


def _count_pages(engine: Engine, request: GenerationRequest, num_beams: int) -> int:
    """Pages that beams hold at most, at their longest and alike in the prompt alone."""
    is_encoded = isinstance(engine.model, EncoderDecoder)
    size = engine.config.page_size
    num_prompt_tokens = 1 if is_encoded else len(request.prompt_tokens)
    num_prompt_tokens += engine.model.num_virtual_tokens
    num_tokens = num_prompt_tokens + request.sampling.max_new_tokens - 1
    shared = num_prompt_tokens // size
    return shared + num_beams * (-(-num_tokens // size) - shared)


def check_beam_search(
    vocab_size: int, config: BeamSearchConfig, stops: frozenset[int]
) -> None:
    """Checks that a search knows enough tokens behind each beam. Raises MaxlmError: it
    does not, or more outputs than beams are asked for."""
    num_known = (
        TOP_LOGPROBS if vocab_size > TOP_LOGPROBS else config.num_beams + len(stops)
    )
    if config.num_beams + len(stops) > num_known:
        message = f"{config.num_beams} beams and {len(stops)} tokens that end an output"
        fix = f"have {num_known} of both at most: so many likeliest tokens are known"
        raise MaxlmError(message, where="num_beams", fix=fix)
    if config.num_return_sequences > config.num_beams:
        message = f"{config.num_return_sequences} outputs of {config.num_beams} beams"
        fix = "ask for fewer, or set num_beams"
        raise MaxlmError(message, where="num_return_sequences", fix=fix)
