"""Log-likelihoods of texts behind others, by the engine or by a masked language model.

What texts share the engine computes once: a context for all of its continuations, and
the beginning of several contexts (examples before a question) in whole pages, while the
cache has room.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

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
                request_id = f"score-{self._num_calls}-{len(waiting)}"
                indices = groups[context]
                running[request_id] = indices
                continuations = [pairs[index][1] for index in indices]
                request = make_score_request(request_id, context, continuations)
                engine.add_request(request)
            for output in engine.step():
                index = running[output.request_id][output.sequence_index]
                scores[index] = read_score(output, pairs[index][1])
                if all(index in scores for index in running[output.request_id]):
                    del running[output.request_id]
            if on_progress is not None:
                on_progress(len(scores))
        return [scores[index] for index in range(len(pairs))]

    def _cut_context(self, context: Tokens, continuation: Tokens) -> tuple[int, ...]:
        longest = self.engine.config.max_length
        if len(continuation) > longest:
            message = (
                f"a continuation has {len(continuation):,} tokens; the longest "
                f"sequence has {longest:,} (max_length)"
            )
            raise MaxlmError(message, fix="score it in parts")
        if isinstance(self.engine.model, EncoderDecoder):
            room = longest  # the encoder reads the context alone
        else:
            room = longest - (len(continuation) - 1)  # the last token is never read
        return tuple(context[-room:])


def make_score_request(
    request_id: str, context: Tokens, continuations: Sequence[Tokens]
) -> GenerationRequest:
    """Makes the request that scores continuations of a context; :func:`read_score`
    reads each sequence's output."""
    return GenerationRequest(
        request_id,
        tuple(context),
        SamplingConfig(temperature=0, max_new_tokens=1),
        num_sequences=len(continuations),
        continuations=tuple(map(tuple, continuations)),
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
        rows: list[list[int]] = []
        masked: list[int] = []
        length = self.model.config.max_seq_len
        num_wrapping = len(self.wrap([])[0])
        for context, continuation in pairs:
            room = length - num_wrapping - len(continuation)
            if room < 0:
                message = (
                    f"a continuation has {len(continuation):,} tokens, and the model "
                    f"reads {length:,}, those at a text's ends included "
                    "(model.max_seq_len)"
                )
                raise MaxlmError(message, fix="score it in parts")
            context = context[max(0, len(context) - room) :]
            row, start = self.wrap([*context, *continuation])
            first = start + len(context)
            # A row for each of the continuation's tokens, which is masked in it.
            masked += range(first, first + len(continuation))
            rows += [row] * len(continuation)
        masked_places = np.array(masked, np.int32)
        logprobs = np.zeros(len(rows))
        is_greedy = np.zeros(len(rows), bool)
        num_done = 0
        for batch, tokens, lengths in iterate_padded_batches(rows, length, self._ways):
            num_rows = len(batch)  # without padding
            places = np.zeros(len(lengths), np.int32)
            places[:num_rows] = masked_places[batch]
            targets = tokens[np.arange(len(lengths)), places]
            tokens[np.arange(num_rows), masked_places[batch]] = self.mask_id
            batch_logprobs, batch_greedy = self._run(
                self.model, self.params, tokens, lengths, places, targets
            )
            logprobs[batch] = np.asarray(batch_logprobs)[:num_rows]
            is_greedy[batch] = np.asarray(batch_greedy)[:num_rows]
            num_done += num_rows
            if on_progress is not None:
                on_progress(num_done * len(pairs) // len(rows))
        scores = []
        start = 0
        for _, continuation in pairs:
            span = slice(start, start + len(continuation))
            start = span.stop
            token_logprobs = logprobs[span]
            score = ContinuationScore(
                logprob=float(token_logprobs.sum()),
                is_greedy=bool(is_greedy[span].all()),
                token_logprobs=tuple(token_logprobs.tolist()),
            )
            scores.append(score)
        return scores


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
    bound = bind(model, params)
    hidden, _, _ = compute_padded_states(bound, model.rules, tokens, lengths)
    places, targets = (
        reshard(x, model.rules.spec("batch"))[:, None] for x in (places, targets)
    )
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logprobs = jax.nn.log_softmax(bound.logits(hidden)[:, 0].astype(jnp.float32))
    chosen = jnp.take_along_axis(logprobs, targets, axis=-1)[:, 0]
    is_greedy = jnp.argmax(logprobs, axis=-1) == targets[:, 0]
    return reshard(chosen, PartitionSpec()), reshard(is_greedy, PartitionSpec())
