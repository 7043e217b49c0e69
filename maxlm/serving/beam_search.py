"""Beam search beside other requests: each step of a search is a request of one token
for each beam, and what beams share is in the cache of prefixes."""

from dataclasses import replace

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.requests import GenerationRequest, SequenceOutput, TokenLogprob
from maxlm.inference.sampling import TOP_LOGPROBS
from maxlm.inference.search.beam import BeamSearch, BeamSearchConfig, check_beam_search
from maxlm.inference.search.continuations import TokenBudget, decode_text
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.serving.engine_loop import EngineLoop
from maxlm.serving.errors import ApiError
from maxlm.serving.schemas import GenerationBody
from maxlm.serving.server_state import ServerState

# Settings that would change which continuation is the likeliest.
_NEUTRAL_SETTINGS = {
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "no_repeat_ngram_size": 0,
}
_ONE_TOKEN = SamplingConfig(temperature=0, max_new_tokens=1)


def check_beam_body(body: GenerationBody) -> None:
    """Checks that a request asks for nothing that a search has not. Raises ApiError."""
    refused = {
        "stream": body.stream,
        "stop": bool(body.stop),
        "bad_words": bool(body.bad_words),
        "response_format": body.has_form,
        "logprobs": getattr(body, "logprobs", None) not in (None, False),
        "echo": getattr(body, "echo", False),
        "min_tokens": body.min_tokens > 0,
        "logit_bias": bool(body.logit_bias),
        "tool_choice": getattr(body, "tool_choice", None) not in (None, "none", "auto"),
    }
    extra = body.model_extra or {}
    for name, neutral in _NEUTRAL_SETTINGS.items():
        refused[name] = extra.get(name, neutral) != neutral
    for name, is_set in refused.items():
        if is_set:
            message = f"use_beam_search goes without {name}: leave one of them out"
            raise ApiError(400, message, param=name, code="unsupported")


async def search_beams(
    state: ServerState, body: GenerationBody, request: GenerationRequest, num_beams: int
) -> list[SequenceOutput]:
    """Returns the ``n`` likeliest continuations of a request's prompt, the best first.
    Raises ApiError: the model is no decoder; MaxlmError: more beams than likeliest
    tokens are known.

    Args:
        request: gives the prompt, the most tokens, and what ends an output.
    """
    engine = state.engine_loop.engine
    if engine is None or isinstance(engine.model, EncoderDecoder):
        message = "beam search over HTTP is for models that continue their prompt"
        raise ApiError(400, message, param="use_beam_search", code="unsupported")
    config = BeamSearchConfig(
        num_beams=num_beams,
        length_penalty=body.length_penalty,
        early_stopping=body.early_stopping,
        max_new_tokens=request.sampling.max_new_tokens,
        num_return_sequences=body.n,
    )
    stops = frozenset(request.stop_token_ids)
    if not request.ignore_eos:
        stops |= frozenset(state.tokenizer.stop_ids)
    check_beam_search(state.tokenizer.vocab_size, config, stops)
    search = BeamSearch(config, stops, TokenBudget(None))
    one_token = replace(
        request,
        sampling=_ONE_TOKEN,
        num_sequences=1,
        ignore_eos=True,
        stop_token_ids=(),
        top_logprobs=TOP_LOGPROBS,
    )
    # Places for the whole search, so that no step of it is refused once it runs.
    with state.engine_loop.admit(num_beams):
        await _run_search(state.engine_loop, search, one_token)
    outputs: list[SequenceOutput] = []
    for index, continuation in enumerate(search.finished[: body.n]):
        output = SequenceOutput(request.request_id, index, list(continuation.token_ids))
        output.text = decode_text(engine, request.prompt_tokens, continuation)
        output.finish_reason = continuation.finish_reason
        output.stop_match = continuation.stop_match
        outputs.append(output)
    return outputs


async def _run_search(
    engine_loop: EngineLoop, search: BeamSearch, one_token: GenerationRequest
) -> None:
    """Advances a search to its end."""
    while search.beams:
        steps: list[GenerationRequest] = []
        for beam in search.beams:
            name = f"{one_token.request_id}-{len(beam.tokens)}-{beam.index}"
            prompt = (*one_token.prompt_tokens, *beam.tokens)
            steps.append(replace(one_token, request_id=name, prompt_tokens=prompt))
        tokens: dict[int, TokenLogprob] = {}
        with await engine_loop.submit(steps, is_admitted=True) as stream:
            async for output in stream:
                index = int(output.request_id.rpartition("-")[2])
                tokens[index] = output.logprobs[0]
        beams = search.advance(tokens)
        search.beams = [
            beam._replace(index=number) for number, beam in enumerate(beams)
        ]
