"""Log-likelihoods under a masked language model: each token is predicted from all others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec, reshard

from maxlm.config import MaxlmError
from maxlm.inference.embedding import compute_padded_states, iterate_padded_batches
from maxlm.inference.scoring import ContinuationScore, Tokens
from maxlm.models.architectures import Encoder
from maxlm.models.params import Params, bind
from maxlm.sharding import bind_mesh


@dataclass(eq=False)
class MaskedScorer:
    """Scores continuations with an encoder: the sum over a continuation's tokens of the
    log-probability of each where it alone is masked (pseudo-log-likelihood, Salazar et al. 2020,
    arXiv 1910.14659, eq. 2)."""

    model: Encoder
    params: Params
    """On ``mesh``."""
    mesh: Mesh
    mask_id: int
    """The token that stands in for another."""
    wrap: Callable[[list[int]], tuple[list[int], int]]
    """Returns a text's tokens with those that documents begin and end with, and how many are
    before."""

    def __post_init__(self) -> None:
        self._ways = prod(self.mesh.shape[axis] for axis in self.model.rules.batch)
        self._run = bind_mesh(self.mesh, jax.jit(_score_masked, static_argnums=0))

    def score(
        self,
        pairs: Sequence[tuple[Tokens, Tokens]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[ContinuationScore]:
        """Scores pairs of context and continuation; see
        :meth:`~maxlm.inference.scoring.Scorer.score`. A context may be empty.

        Raises:
            MaxlmError: a continuation that is longer than the model's longest row.
        """
        if not pairs:
            return []
        rows, places, length = [], [], self.model.config.max_seq_len
        for context, continuation in pairs:
            room = length - len(self.wrap([])[0]) - len(continuation)
            if room < 0:
                what = f"a continuation has {len(continuation):,} tokens, and the model reads "
                what += f"{length:,}, those at a text's ends included (model.max_seq_len)"
                raise MaxlmError(what, fix="score it in parts")
            context = context[max(0, len(context) - room) :]
            row, start = self.wrap([*context, *continuation])
            first = start + len(context)
            for place in range(first, first + len(continuation)):
                rows.append(row)
                places.append(place)
        at, logprobs = np.array(places, np.int32), np.zeros(len(rows))
        is_greedy, num_done = np.zeros(len(rows), bool), 0
        for batch, tokens, lengths in iterate_padded_batches(rows, length, self._ways):
            own, index = np.zeros(len(lengths), np.int32), np.arange(len(batch))
            own[: len(batch)] = at[batch]
            targets = tokens[np.arange(len(lengths)), own]
            tokens[index, at[batch]] = self.mask_id
            found = self._run(self.model, self.params, tokens, lengths, own, targets)
            logprobs[batch], is_greedy[batch] = (np.asarray(x)[: len(batch)] for x in found)
            num_done += len(batch)
            if on_progress is not None:
                on_progress(num_done * len(pairs) // len(rows))
        ends = np.cumsum([len(continuation) for _, continuation in pairs])[:-1]
        return [
            ContinuationScore(float(own.sum()), bool(greedy.all()), tuple(own.tolist()))
            for own, greedy in zip(np.split(logprobs, ends), np.split(is_greedy, ends), strict=True)
        ]


def _score_masked(
    model: Encoder,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    places: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability [B] of ``targets`` [B] at ``places`` [B] of rows [B, S], and
    whether each is the likeliest token there."""
    bound: Any = bind(model, params)
    hidden, _, _ = compute_padded_states(bound, model.rules, tokens, lengths)
    places, targets = (reshard(x, model.rules.spec("batch"))[:, None] for x in (places, targets))
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logprobs = jax.nn.log_softmax(bound.logits(hidden)[:, 0].astype(jnp.float32))
    chosen = jnp.take_along_axis(logprobs, targets, axis=-1)[:, 0]
    is_greedy = jnp.argmax(logprobs, axis=-1) == targets[:, 0]
    return reshard(chosen, PartitionSpec()), reshard(is_greedy, PartitionSpec())
