"""Sequences that the engine generates, and their part in a step."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from maxlm.inference.pages import PrefixNode
from maxlm.inference.prompt_vectors import PromptVectors
from maxlm.inference.requests import GenerationRequest


@dataclass(eq=False, slots=True)
class RunningSequence:
    """One continuation of a request's prompt. The scheduler alone changes it, but for
    ``needs_host``, ``is_branching``, ``stop_ids``, ``vectors``, ``num_drafts`` and
    ``next_drafts``."""

    request: GenerationRequest
    index: int
    """Which of the request's sequences."""
    tokens: list[int]
    """Virtual tokens, prompt (of the decoder) and output."""
    num_prompt_tokens: int
    """Virtual ones included."""
    num_shared_tokens: int
    """Tokens of the prompt that the request's other sequences have as well."""
    order: tuple[int, int]
    """Its request's place by arrival, its own by creation: smaller ones go first."""
    encoder_tokens: tuple[int, ...] = ()
    """The prompt, where an encoder reads it."""
    cache_key: Hashable = None
    """Sequences with different ones share no pages."""
    params_version: int = 0
    """Number of the parameters that its caches began with, likewise."""
    num_virtual_tokens: int = 0
    """Dummy tokens that stand before the prompt's; see
    :mod:`maxlm.adapters.virtual_tokens`."""
    vectors: PromptVectors | None = None
    """In place of some of the prompt's tokens."""
    needs_host: bool = False
    """Whether its next token depends on what the host does with the last one (a
    grammar, banned sequences)."""
    is_branching: bool = False
    """Whether branches may replace it (beam search); then it has no text and no
    drafts."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end its output."""

    num_drafts: int = field(default=0, init=False)
    """Tokens to verify behind the next one, set before `schedule`; `finish_step` makes
    it 0."""
    next_drafts: list[int] = field(default_factory=list, init=False)
    """Tokens that modules of ``mtp`` guessed, in the last step, to follow its last
    one."""
    state: Literal["waiting", "running", "finished"] = field(
        default="waiting", init=False
    )
    num_computed: int = field(default=0, init=False)
    """Tokens whose keys and values are in its pages."""
    shard: int = field(default=0, init=False)
    row: int = field(default=-1, init=False)
    """Its row in its shard while it runs; -1: none."""
    num_cached_tokens: int = field(default=0, init=False)
    """Tokens of the prompt that were computed before it started."""
    has_encoder_output: bool = field(default=False, init=False)
    """Whether its row has the encoder's output."""
    num_pages: int = field(default=0, init=False)
    """Pages of its tokens in each page table, those behind a window, which it has not,
    included."""
    node: PrefixNode | None = field(default=None, init=False, repr=False)
    """Its deepest node in the prefix tree; None: it shares nothing."""
    routes: list[np.ndarray] = field(default_factory=list, init=False, repr=False)
    """Where the engine records them, the experts [E, k] of each token when it was first
    computed; after a preemption they stay, as drawn tokens follow from them."""

    def list_cache_ids(self, start: int, stop: int) -> list[int]:
        """Lists some tokens by the ids that caches tell apart: their own, and those of
        vectors in their places."""
        ids = self.tokens[start:stop]
        if self.vectors is not None:
            for place, cache_id in self.vectors.cache_ids.items():
                if start <= place < stop and place < len(self.tokens):
                    ids[place - start] = cache_id
        return ids

    def record_routes(self, routes: np.ndarray) -> None:
        """Records the experts [tokens, E, k] of the next tokens that are computed."""
        num_known = len(self.routes) - self.num_computed
        assert num_known >= 0
        # A copy: a step's array is of all its sequences, and large.
        self.routes += list(routes[num_known:].copy())

    @property
    def prefix_key(self) -> Hashable:
        """Sequences with equal ones have equal keys and values of equal tokens."""
        return self.cache_key, self.params_version

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def logprobs_start(self) -> int:
        """Index of the first token of the prompt whose log-probability may be
        wanted."""
        first = self.num_virtual_tokens + 1
        return self.num_shared_tokens if self.request.continuations else first

    @property
    def num_to_compute(self) -> int:
        """Tokens whose keys and values are not there."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether it goes on token by token; continuations are read, however long they
        are, and so is a prompt's last token that has a vector: rows that decode have
        tokens alone."""
        if self.num_to_compute != 1 or self.request.continuations:
            return False
        vectors = self.vectors
        return vectors is None or int(vectors.places[-1]) != len(self.tokens) - 1

    @property
    def num_tokens_left(self) -> int:
        """Tokens that it may still generate."""
        return self.request.sampling.max_new_tokens - self.num_output_tokens


def get_order(sequence: RunningSequence) -> tuple[int, int]:
    """Returns what sequences are sorted by, for ``key=``: the oldest first."""
    return sequence.order


class DecodeRow(NamedTuple):
    """A sequence whose last token is computed, with its drafts, or with the tokens that
    follow in the steps of one dispatch."""

    sequence: RunningSequence
    num_tokens: int
    """1 and the drafts, or at most the step's ``num_steps``."""


class PrefillChunk(NamedTuple):
    """Tokens of a sequence to compute at once."""

    sequence: RunningSequence
    start: int
    """Index of the first, the sequence's ``num_computed``."""
    num_tokens: int
    samples: bool
    """Whether they are the sequence's last ones, so that a token follows."""


class PageCopy(NamedTuple):
    """A page to copy in a group's pool."""

    shard: int
    group: int
    source: int
    destination: int


class RowCopy(NamedTuple):
    """A row to copy, where caches are kept by row (recurrent states, an encoder's
    output)."""

    shard: int
    source: int
    destination: int


@dataclass
class ScheduledStep:
    """Work for the device, in this order: copies, each kind read as a whole before any
    is written; encoders; decode rows and chunks."""

    decode: list[DecodeRow] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    drafts: dict[RunningSequence, list[int]] = field(default_factory=dict)
    """Tokens of rows that decode to verify behind their last ones."""
    num_steps: int = 1
    """Consecutive decode steps in one dispatch; 1 with chunks or drafts."""
    encode: list[RunningSequence] = field(default_factory=list)
    """Sequences whose encoder has to run."""
    page_copies: list[PageCopy] = field(default_factory=list)
    row_copies: list[RowCopy] = field(default_factory=list)
