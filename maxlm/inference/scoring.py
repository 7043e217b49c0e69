"""Log-likelihoods of texts behind others, by the engine or by a masked language model.

What texts share the engine computes once: a context for all of its continuations, and
the beginning of several contexts (examples before a question) in whole pages, while the
cache has room.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec, reshard

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.inference.embedding import compute_padded_states, iterate_padded_batches
from maxlm.inference.engine import Engine
from maxlm.inference.requests import GenerationRequest, SequenceOutput
from maxlm.models.architectures.encoder import Encoder
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.params import Params, bind
from maxlm.sharding import bind_mesh

Tokens = Sequence[int]


class ContinuationScore(NamedTuple):
    """How likely a continuation is."""

    logprob: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest in its place."""
    token_logprobs: tuple[float, ...]
    """Log-probability of each token, in nats."""


class Scorer:
    """Scores continuations with an engine that does nothing else meanwhile."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._num_calls = 0

    def score(
        self,
        pairs: Sequence[tuple[Tokens, Tokens]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[ContinuationScore]:
        """Scores pairs of context and continuation in their order; both are token ids,
        and not empty. A context too long loses its first tokens. ``on_progress`` is
        told how many pairs are done. Raises MaxlmError: a continuation that is longer
        than the engine's longest sequence."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, pair in enumerate(pairs):
            groups.setdefault(self._cut_context(*pair), []).append(index)
        self._num_calls += 1
        # Contexts that begin alike come one after the other, the next ones from the
        # end.
        waiting = sorted(groups, reverse=True)
        running: dict[str, list[int]] = {}
        scores: dict[int, ContinuationScore] = {}
        engine = self.engine
        room = 2 * self.engine.config.max_sequences * self.engine.num_shards
        while waiting or running:
            while waiting and sum(map(len, running.values())) < room:
                context = waiting.pop()
                name = f"score-{self._num_calls}-{len(waiting)}"
                own = groups[context]
                running[name] = own
                engine.add_request(
                    make_score_request(name, context, [pairs[i][1] for i in own])
                )
            for output in engine.step():
                index = running[output.request_id][output.sequence_index]
                scores[index] = read_score(output, pairs[index][1])
                if all(i in scores for i in running[output.request_id]):
                    del running[output.request_id]
            if on_progress is not None:
                on_progress(len(scores))
        return [scores[index] for index in range(len(pairs))]

    def _cut_context(self, context: Tokens, continuation: Tokens) -> tuple[int, ...]:
        longest = self.engine.config.max_length
        if len(continuation) > longest:
            what = f"a continuation has {len(continuation):,} tokens; the longest sequence has "
            what += f"{longest:,} (max_length)"
            raise MaxlmError(what, fix="score it in parts")
        # The last token is looked up, never read. An encoder reads contexts apart from
        # it.
        behind = (
            0
            if isinstance(self.engine.model, EncoderDecoder)
            else len(continuation) - 1
        )
        return tuple(context[behind - longest :])


def make_score_request(
    request_id: str, context: Tokens, continuations: Sequence[Tokens]
) -> GenerationRequest:
    """Makes the request that scores continuations of a context; :func:`read_score`
    reads each sequence's output."""
    return GenerationRequest(
        request_id,
        tuple(context),
        SamplingConfig(temperature=0, max_new_tokens=1),
        len(continuations),
        tuple(map(tuple, continuations)),
        top_logprobs=1,
        prompt_logprobs=1,
    )


def read_score(output: SequenceOutput, continuation: Tokens) -> ContinuationScore:
    """Returns the score of a continuation that the engine has read."""
    entries = [*(output.prompt_logprobs or ()), *output.logprobs]
    assert [entry.token_id for entry in entries] == [*continuation]
    logprobs = tuple(entry.logprob for entry in entries)
    is_greedy = all(entry.token_id == entry.top[0][0] for entry in entries)
    return ContinuationScore(sum(logprobs), is_greedy, logprobs)


@dataclass(eq=False)
class MaskedScorer:
    """Scores continuations with an encoder: the sum over a continuation's tokens of the
    log-probability of each where it alone is masked (pseudo-log-likelihood, Salazar et
    al. 2020, arXiv 1910.14659, eq. 2)."""

    model: Encoder
    params: Params
    """On ``mesh``."""
    mesh: Mesh
    mask_id: int
    """The token that stands in for another."""
    wrap: Callable[[list[int]], tuple[list[int], int]]
    """Returns a text's tokens with those that documents begin and end with, and how
    many are before."""

    def __post_init__(self) -> None:
        self._ways = prod(self.mesh.shape[axis] for axis in self.model.rules.batch)
        self._run = bind_mesh(self.mesh, jax.jit(_score_masked, static_argnums=0))

    def score(
        self,
        pairs: Sequence[tuple[Tokens, Tokens]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[ContinuationScore]:
        """Scores pairs of context and continuation; see :meth:`Scorer.score`. A context
        may be empty. Raises MaxlmError: a continuation that is longer than the model's
        longest row."""
        if not pairs:
            return []
        rows = []
        places = []
        length = self.model.config.max_seq_len
        for context, continuation in pairs:
            room = length - len(self.wrap([])[0]) - len(continuation)
            if room < 0:
                what = f"a continuation has {len(continuation):,} tokens, and the model reads "
                what += (
                    f"{length:,}, those at a text's ends included (model.max_seq_len)"
                )
                raise MaxlmError(what, fix="score it in parts")
            context = context[max(0, len(context) - room) :]
            row, start = self.wrap([*context, *continuation])
            first = start + len(context)
            places += range(first, first + len(continuation))
            rows += [row] * len(continuation)
        at = np.array(places, np.int32)
        logprobs = np.zeros(len(rows))
        is_greedy = np.zeros(len(rows), bool)
        num_done = 0
        for batch, tokens, lengths in iterate_padded_batches(rows, length, self._ways):
            own = np.zeros(len(lengths), np.int32)
            index = np.arange(len(batch))
            own[: len(batch)] = at[batch]
            targets = tokens[np.arange(len(lengths)), own]
            tokens[index, at[batch]] = self.mask_id
            found = self._run(self.model, self.params, tokens, lengths, own, targets)
            logprobs[batch], is_greedy[batch] = (
                np.asarray(x)[: len(batch)] for x in found
            )
            num_done += len(batch)
            if on_progress is not None:
                on_progress(num_done * len(pairs) // len(rows))
        ends = np.cumsum([len(continuation) for _, continuation in pairs])[:-1]
        return [
            ContinuationScore(float(own.sum()), bool(greedy.all()), tuple(own.tolist()))
            for own, greedy in zip(
                np.split(logprobs, ends), np.split(is_greedy, ends), strict=True
            )
        ]


def _score_masked(
    model: Encoder,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    places: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability [B] of ``targets`` [B] at ``places`` [B] of rows [B,
    S], and whether each is the likeliest token there."""
    bound: Any = bind(model, params)
    hidden, _, _ = compute_padded_states(bound, model.rules, tokens, lengths)
    places, targets = (
        reshard(x, model.rules.spec("batch"))[:, None] for x in (places, targets)
    )
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logprobs = jax.nn.log_softmax(bound.logits(hidden)[:, 0].astype(jnp.float32))
    chosen = jnp.take_along_axis(logprobs, targets, axis=-1)[:, 0]
    is_greedy = jnp.argmax(logprobs, axis=-1) == targets[:, 0]
    return reshard(chosen, PartitionSpec()), reshard(is_greedy, PartitionSpec())
