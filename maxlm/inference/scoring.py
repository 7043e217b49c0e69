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
        # Indices of the pairs that share a context: one request scores them all.
        indices_by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (full_context, continuation) in enumerate(pairs):
            context = self._cut_context(full_context, continuation)
            indices_by_context.setdefault(context, []).append(index)
        # Contexts that begin alike come one after the other, so that the cache has
        # their common pages; the next ones from the end.
        waiting = sorted(indices_by_context, reverse=True)
        running: dict[str, list[int]] = {}
        scores: dict[int, ContinuationScore] = {}
        engine = self.engine
        self._num_calls += 1
        # Twice as many as run at once: some wait when rows become free.
        max_added = 2 * engine.config.max_sequences * engine.num_shards
        while waiting or running:
            num_added = sum(len(indices) for indices in running.values())
            while waiting and num_added < max_added:
                context = waiting.pop()
                request_id = f"score-{self._num_calls}-{len(waiting)}"
                indices = indices_by_context[context]
                running[request_id] = indices
                num_added += len(indices)
                continuations = [pairs[index][1] for index in indices]
                request = make_score_request(request_id, context, continuations)
                engine.add_request(request)
            for output in engine.step():
                indices = running[output.request_id]
                index = indices[output.sequence_index]
                _, continuation = pairs[index]
                scores[index] = read_score(output, continuation)
                if all(index in scores for index in indices):
                    del running[output.request_id]
            if on_progress is not None:
                on_progress(len(scores))
        return [scores[index] for index in range(len(pairs))]

    def _cut_context(self, context: Tokens, continuation: Tokens) -> tuple[int, ...]:
        """Returns the last tokens of a context, as many as fit before a
        continuation."""
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
    # All tokens but the last belong to the prompt, which the engine reads; the last one
    # is its output.
    entries = [*(output.prompt_logprobs or ()), *output.logprobs]
    assert [entry.token_id for entry in entries] == [*continuation]
    logprobs = tuple(entry.logprob for entry in entries)
    is_greedy = True
    for entry in entries:
        likeliest_id, _ = entry.top[0]
        is_greedy &= entry.token_id == likeliest_id
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
        # Shards of the batch, over which a batch's rows must divide.
        self._num_shards = prod(
            self.mesh.shape[axis] for axis in self.model.rules.batch
        )
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
        rows, masked_places = self._make_rows(pairs)

        # Of each row, in the order of rows.
        logprobs = np.zeros(len(rows))
        is_greedy = np.zeros(len(rows), bool)
        num_done = 0
        batches = iterate_padded_batches(
            rows, self.model.config.max_seq_len, self._num_shards
        )
        for batch, tokens, lengths in batches:
            # `batch` has the rows' indices; behind them `tokens` has rows of padding,
            # whose places and results do not count.
            num_rows = len(batch)
            num_padded_rows = len(lengths)
            places = np.zeros(num_padded_rows, np.int32)
            places[:num_rows] = masked_places[batch]
            targets = tokens[np.arange(num_padded_rows), places]
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

    def _make_rows(
        self, pairs: Sequence[tuple[Tokens, Tokens]]
    ) -> tuple[list[list[int]], np.ndarray]:
        """Returns a row for each token of each pair's continuation, and the place of
        that token in it, int32 [rows]."""
        rows: list[list[int]] = []
        masked_places: list[int] = []
        longest = self.model.config.max_seq_len
        num_wrapping = len(self.wrap([])[0])
        for context, continuation in pairs:
            room = longest - num_wrapping - len(continuation)
            if room < 0:
                message = (
                    f"a continuation has {len(continuation):,} tokens, and the model "
                    f"reads {longest:,}, those at a text's ends included "
                    "(model.max_seq_len)"
                )
                raise MaxlmError(message, fix="score it in parts")
            # Not context[-room:], which is all of it where there is no room.
            context = context[max(0, len(context) - room) :]
            row, num_before = self.wrap([*context, *continuation])
            first = num_before + len(context)
            masked_places += range(first, first + len(continuation))
            rows += [row] * len(continuation)
        return rows, np.array(masked_places, np.int32)


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
    by_row = model.rules.spec("batch")
    # [B] -> [B, 1]
    places = reshard(places, by_row)[:, None]
    targets = reshard(targets, by_row)[:, None]
    # [B, S, D] -> [B, 1, D]: logits of the masked places alone.
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logits = bound.logits(hidden)[:, 0].astype(jnp.float32)
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, targets, axis=-1)[:, 0]
    is_greedy = jnp.argmax(logprobs, axis=-1) == targets[:, 0]
    replicated = PartitionSpec()
    return reshard(chosen, replicated), reshard(is_greedy, replicated)
