"""Requests to the engine, and what it answers with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from maxlm.config.sampling import SamplingConfig

FinishReason = Literal["stop", "length", "abort"]
"""stop: an end-of-text token or a stop string came; length: ``max_new_tokens``, or the
longest sequence that the engine holds; abort: someone gave it up."""


@dataclass(frozen=True)
class GrammarSpec:
    """A form that the output must have."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str = ""
    """The schema as JSON text, the expression, or the grammar; nothing for
    json_object."""
    asked_by: str = "response_format"
    """The field of the request that asks for it, to name in errors."""


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue, by one sequence or several."""

    request_id: str
    """Unique among those that the engine holds."""
    prompt_tokens: tuple[int, ...]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    num_sequences: int = 1
    """Sequences that continue the prompt, each with a random stream of its own."""
    first_stream: int = 0
    """Number of the first one's random stream among those of ``sampling.seed``; the
    others follow."""
    continuations: tuple[tuple[int, ...], ...] = ()
    """Tokens to score behind the prompt, one of these for each sequence, in place of
    drawing any: the log-probability of a continuation's last token is in the output's
    ``logprobs``, those of all before it are its ``prompt_logprobs``. The prompt is
    computed once for all of them."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the output, and are cut off from it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end it, beside the tokenizer's."""
    ignore_eos: bool = False
    """Whether the tokenizer's end-of-text tokens do not end the output."""
    grammar: GrammarSpec | None = None
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that the output may not have; each has one token at least."""
    top_logprobs: int | None = None
    """Log-probabilities of each output token, and of so many likeliest ones, 20 at
    most; None: none. They are the model's own: before penalties, temperature and
    filters."""
    scales_logprobs: bool = False
    """Whether these are of the logits divided by ``sampling.temperature``, over the
    whole vocabulary: what a policy drew from that learns at that temperature. Those of
    the prompt's tokens stay the model's own."""
    routes: bool = False
    """Whether outputs have the experts of the tokens that were read; the engine's
    config must have ``record_routes``."""
    adapter: str | None = None
    """Name of a loaded adapter (`Engine.load_adapter`); None: the base alone."""
    prompt_logprobs: int | None = None
    """Log-probabilities of each token of the prompt but the first, likewise; with
    ``continuations`` of their tokens alone."""
    items: Mapping[str, np.ndarray] | None = field(default=None, compare=False)
    """Arrays [items, ...] for the model's frontend by name, whose vectors stand at the
    prompt's placeholders; None: it has none, or ``embeddings``."""
    embeddings: np.ndarray | None = field(default=None, compare=False)
    """Vectors [n, d_model] in place of the embeddings of some of the prompt's
    tokens."""
    embedding_places: tuple[int, ...] | None = None
    """Indices of these tokens in the prompt, ascending; None: those of the frontend's
    placeholders."""

    @property
    def logprobs_temperature(self) -> float:
        """What logits are divided by before log-probabilities of output tokens are
        taken."""
        temperature = self.sampling.temperature
        # The likeliest token alone is drawn at 0, and its probability says nothing.
        return temperature if self.scales_logprobs and temperature > 0 else 1.0


class TokenLogprob(NamedTuple):
    """A token, its log-probability (natural), and the likeliest tokens in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), likeliest first."""


@dataclass
class SequenceOutput:
    """New tokens of one of a request's sequences."""

    request_id: str
    sequence_index: int
    """0, 1, ... of the request's ``num_sequences``."""
    token_ids: list[int]
    text: str = ""
    """Text that is complete with these tokens: never a part of a character, nor what
    may begin a stop string. "" where the engine has no tokenizer."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities of each token, if asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Once, with the sequence's first tokens, if asked for: of prompt tokens 1, 2,
    ..."""
    finish_reason: FinishReason | None = None
    """None: more will come."""
    stop_match: str | int | None = None
    """The stop string, or the token id, that ended it."""
    num_cached_tokens: int = 0
    """Tokens of the prompt whose cache was there already (a shared prefix)."""
    routes: np.ndarray | None = None
    """If asked for: int8 or int16 [tokens, E, k], the experts that the tokens read
    since the last output met in the E layers with experts; see
    :mod:`maxlm.models.architectures.routes`. The first output has the prompt's, cached
    ones included. A sequence's last token is never read, and has none."""

    def append(self, later: "SequenceOutput") -> None:
        """Adds the sequence's next output to this one."""
        self.token_ids += later.token_ids
        self.text += later.text
        self.logprobs += later.logprobs
        self.finish_reason, self.stop_match = later.finish_reason, later.stop_match
        if later.routes is not None:
            routes = [] if self.routes is None else [self.routes]
            self.routes = np.concatenate([*routes, later.routes])
