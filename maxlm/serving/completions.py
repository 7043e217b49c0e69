"""/v1/completions: continuations of texts or token ids."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from starlette.requests import Request
from starlette.responses import Response

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.requests import GenerationRequest, SequenceOutput, TokenLogprob
from maxlm.runtime.json_types import JsonObject
from maxlm.serving.errors import ApiError
from maxlm.serving.generation import LOWEST_LOGPROB, Answer, decode_token
from maxlm.serving.schemas import MAX_PROMPTS, CompletionBody, list_prompts
from maxlm.serving.server_state import ServerState


@dataclass(eq=False)
class _Completions(Answer):
    """The answer to /v1/completions."""

    id_prefix = "cmpl"
    object_names = ("text_completion", "text_completion")
    body: CompletionBody
    texts: list[str]
    """The prompts as ``echo`` repeats them."""
    num_chars: dict[int, int] = field(default_factory=dict)
    """Characters that were described before, by sequence."""
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    """By prompt."""

    def make_request(
        self, request_id: str, prompt: tuple[int, ...]
    ) -> GenerationRequest:
        body = self.body
        max_new_tokens = self.state.resolve_max_tokens(
            len(prompt), body.max_tokens, "prompt"
        )
        request = body.make_request(
            request_id,
            prompt,
            max_new_tokens,
            self.state.tokenizer,
            self.state.sampling_defaults,
        )
        top_logprobs = body.logprobs
        if self.num_sequences > body.n and top_logprobs is None:
            top_logprobs = 0  # the best are found by their log-probabilities
        return replace(
            request,
            num_sequences=self.num_sequences,
            top_logprobs=top_logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )

    @property
    def num_sequences(self) -> int:
        """See :class:`Answer`; more than ``n`` where the best of them are asked for."""
        return self.body.best_of or self.body.n

    def describe_all(self, outputs: Mapping[int, SequenceOutput]) -> list[JsonObject]:
        """See :class:`Answer`."""
        choices: list[JsonObject] = []
        for start in range(0, len(outputs), self.num_sequences):
            indices = list(range(start, start + self.num_sequences))
            # A prompt is computed for the first of its sequences, which may not be
            # among the best.
            prompt_logprobs = outputs[start].prompt_logprobs or []
            prompt_index = start // self.num_sequences
            self.prompt_logprobs.setdefault(prompt_index, prompt_logprobs)
            if self.num_sequences > self.body.n:
                indices.sort(key=lambda index: -compute_mean_logprob(outputs[index]))
            for index in indices[: self.body.n]:
                choice = self.describe(index, outputs[index])
                choices.append({**choice, "index": len(choices)})
        return choices

    def describe(self, index: int, output: SequenceOutput) -> JsonObject:
        text = output.text
        entries = output.logprobs
        if self.body.max_tokens == 0:  # the engine makes one at least
            text = ""
            entries = []
            self.completion_tokens = 0
        prompt_index = index // self.num_sequences
        if self.body.echo and index not in self.num_chars:
            text = self.texts[prompt_index] + text
            # Nothing stands before the first token that could predict it.
            first = TokenLogprob(self.prompts[prompt_index][0], math.nan)
            # A prompt is computed for the first of its sequences, whose output comes
            # first.
            prompt_logprobs = self.prompt_logprobs.setdefault(
                prompt_index, output.prompt_logprobs or []
            )
            entries = [first, *prompt_logprobs, *entries]
        offset = self.num_chars.get(index, 0)
        self.num_chars[index] = offset + len(text)
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = describe_logprobs(self.state.tokenizer, entries, offset)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
        }


def compute_mean_logprob(output: SequenceOutput) -> float:
    """Returns the mean log-probability (natural) of an output's tokens."""
    logprobs = [entry.logprob for entry in output.logprobs]
    return sum(logprobs) / max(len(logprobs), 1)


async def create_completion(state: ServerState, request: Request) -> Response:
    """Answers /v1/completions."""
    body = await state.read_body(request, CompletionBody)
    prompts = list_prompts(body.prompt)
    if body.best_of is not None and body.best_of < body.n:
        message = f"best_of is {body.best_of}, fewer than the {body.n} of n"
        raise ApiError(400, message, param="best_of")
    if body.best_of is not None and body.best_of > body.n and body.stream:
        message = (
            "the best of several sequences are known at their end: leave stream out"
        )
        raise ApiError(400, message, param="best_of")
    num_sequences = body.best_of or body.n
    if len(prompts) * num_sequences > MAX_PROMPTS:
        message = f"more than {MAX_PROMPTS} sequences at once"
        raise ApiError(400, message, param="prompt")
    kept_tokens = state.resolve_truncation(body.truncate_prompt_tokens, body.max_tokens)
    encoded = await state.encode_prompts(
        prompts, "prompt", allow_special=body.parse_special, kept_tokens=kept_tokens
    )
    texts: list[str] = []
    if body.echo:
        for prompt, tokens in zip(prompts, encoded, strict=True):
            if isinstance(prompt, str) and kept_tokens is None:
                texts.append(prompt)
            else:
                texts.append(state.tokenizer.decode(tokens))
    return await _Completions(state, body, encoded, texts).respond(request)


def describe_logprobs(
    tokenizer: Tokenizer, logprobs: list[TokenLogprob], offset: int
) -> JsonObject:
    """Returns log-probabilities as /v1/completions does; a prompt's first token has
    none (NaN)."""
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offsets: list[int] = []
    for token_id, logprob, top in logprobs:
        tokens.append(name_token(tokenizer, token_id))
        text_offsets.append(offset)
        text, _ = decode_token(tokenizer, token_id)
        offset += len(text)
        if math.isnan(logprob):
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        token_logprobs.append(max(logprob, LOWEST_LOGPROB))
        likeliest: dict[str, float] = {}
        for top_id, top_logprob in (*top, (token_id, logprob)):
            # Tokens may read alike: the likelier one comes first, and stays.
            name = name_token(tokenizer, top_id)
            likeliest.setdefault(name, max(top_logprob, LOWEST_LOGPROB))
        top_logprobs.append(likeliest)
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": text_offsets,
    }


def name_token(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Returns a token's text, or ``bytes:\xe2\x80`` for a part of a character."""
    text, data = decode_token(tokenizer, token_id)
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
