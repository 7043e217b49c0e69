"""/v1/completions: continuations of texts or token ids."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from maxlm.data.tokenizer import Tokenizer
from maxlm.inference.requests import GenerationRequest, SequenceOutput, TokenLogprob
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
        most = self.state.resolve_max_tokens(len(prompt), body.max_tokens, "prompt")
        return replace(
            body.make_request(
                request_id,
                prompt,
                most,
                self.state.tokenizer,
                self.state.sampling_defaults,
            ),
            num_sequences=self.num_sequences,
            # The best are found by their log-probabilities.
            top_logprobs=body.logprobs
            if self.num_sequences == body.n
            else body.logprobs or 0,
            prompt_logprobs=body.logprobs if body.echo else None,
        )

    @property
    def num_sequences(self) -> int:
        """See :class:`Answer`; more than ``n`` where the best of them are asked for."""
        return self.body.best_of or self.body.n

    def describe_all(
        self, outputs: Mapping[int, SequenceOutput]
    ) -> list[dict[str, Any]]:
        """See :class:`Answer`."""
        choices: list[dict[str, Any]] = []
        for start in range(0, len(outputs), self.num_sequences):
            drawn = range(start, start + self.num_sequences)
            best = sorted(
                drawn, key=lambda index: -compute_mean_logprob(outputs[index])
            )
            # A prompt is computed for the first of its sequences, which may not be
            # among the best.
            known = outputs[start].prompt_logprobs or []
            self.prompt_logprobs.setdefault(start // self.num_sequences, known)
            returned = (
                drawn if self.num_sequences == self.body.n else best[: self.body.n]
            )
            for index in returned:
                choices.append(
                    {**self.describe(index, outputs[index]), "index": len(choices)}
                )
        return choices

    def describe(self, index: int, output: SequenceOutput) -> dict[str, Any]:
        text = output.text
        entries = output.logprobs
        described = None
        if self.body.max_tokens == 0:  # the engine makes one at least
            text = ""
            entries = []
            self.completion_tokens = 0
        prompt_index = index // self.num_sequences
        if self.body.echo and index not in self.num_chars:
            text = self.texts[prompt_index] + text
            first = TokenLogprob(
                self.prompts[prompt_index][0], math.nan
            )  # nothing before it
            # A prompt is computed for the first of its sequences, whose output comes
            # first.
            known = self.prompt_logprobs.setdefault(
                prompt_index, output.prompt_logprobs or []
            )
            entries = [first, *known, *entries]
        offset = self.num_chars.get(index, 0)
        self.num_chars[index] = offset + len(text)
        if self.body.logprobs is not None:
            described = describe_logprobs(self.state.tokenizer, entries, offset)
        reason = output.finish_reason
        return {
            "index": index,
            "text": text,
            "logprobs": described,
            "finish_reason": reason,
        }


def compute_mean_logprob(output: SequenceOutput) -> float:
    """Returns the mean log-probability (natural) of an output's tokens."""
    logprobs = [entry.logprob for entry in output.logprobs]
    return sum(logprobs) / max(len(logprobs), 1)


async def create_completion(state: ServerState, request: Request) -> Response:
    """Answers /v1/completions."""
    body = await state.read_body(request, CompletionBody)
    given = list_prompts(body.prompt)
    if body.best_of is not None and body.best_of < body.n:
        message = f"best_of is {body.best_of}, fewer than the {body.n} of n"
        raise ApiError(400, message, param="best_of")
    if body.best_of is not None and body.best_of > body.n and body.stream:
        message = (
            "the best of several sequences are known at their end: leave stream out"
        )
        raise ApiError(400, message, param="best_of")
    if len(given) * (body.best_of or body.n) > MAX_PROMPTS:
        raise ApiError(
            400, f"more than {MAX_PROMPTS} sequences at once", param="prompt"
        )
    kept_tokens = state.resolve_truncation(body.truncate_prompt_tokens, body.max_tokens)
    prompts = await state.encode_prompts(
        given, "prompt", allow_special=body.parse_special, kept_tokens=kept_tokens
    )
    decode = state.tokenizer.decode
    texts: list[str] = []
    if body.echo:
        for prompt, tokens in zip(given, prompts, strict=True):
            is_whole = isinstance(prompt, str) and kept_tokens is None
            texts.append(str(prompt) if is_whole else decode(tokens))
    return await _Completions(state, body, prompts, texts).respond(request)


def describe_logprobs(
    tokenizer: Tokenizer, logprobs: list[TokenLogprob], offset: int
) -> dict[str, Any]:
    """Returns log-probabilities as /v1/completions does; a prompt's first token has
    none (NaN)."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    rows: list[tuple[Any, ...]] = []
    for token_id, logprob, top in logprobs:
        best: dict[str, float] = {}
        for other, value in (
            *top,
            (token_id, logprob),
        ):  # the likelier of two that read alike
            best.setdefault(name_token(tokenizer, other), max(value, LOWEST_LOGPROB))
        found = (
            (max(logprob, LOWEST_LOGPROB), best) if logprob == logprob else (None, None)
        )
        rows.append((name_token(tokenizer, token_id), *found, offset))
        offset += len(decode_token(tokenizer, token_id)[0])
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def name_token(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Returns a token's text, or ``bytes:\xe2\x80`` for a part of a character."""
    text, data = decode_token(tokenizer, token_id)
    return (
        "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        if "\ufffd" in text
        else text
    )
