"""Promise: a masked language model's score of a text is the sum over its tokens of the
log-probability of each with that one masked, whatever it is scored beside."""

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.inference.scoring import MaskedScorer
from maxlm.models.params import bind
from tests.inference.test_embedding import make_encoder

pytestmark = pytest.mark.heavy

FIRST, LAST, MASK = 1, 2, 3


def test_each_token_is_predicted_from_all_others(mesh, one_device_mesh):
    where = mesh(data=2, tensor=2)
    with jax.set_mesh(where):
        model, params = make_encoder(where)
    scorer = MaskedScorer(
        model,
        params,
        where,
        mask_id=MASK,
        wrap=lambda tokens: ([FIRST, *tokens, LAST], 1),
    )
    rng = np.random.default_rng(0)
    done = []
    pairs = [
        (rng.integers(4, 66, before).tolist(), rng.integers(4, 66, size).tolist())
        for before, size in [(0, 5), (7, 1), (3, 28)]
    ]
    scores = scorer.score(pairs, done.append)
    assert done[-1] == len(pairs)
    with jax.set_mesh(one_device_mesh):
        model, params = make_encoder(one_device_mesh)

        @jax.jit
        def compute_logits(params, rows):
            places = np.broadcast_to(
                np.arange(rows.shape[1], dtype=np.int32), rows.shape
            )
            bound = bind(model, params)
            return bound.logits(bound(rows, places)[0])

        for (context, tail), score in zip(pairs, scores, strict=True):
            places = 1 + len(context) + np.arange(len(tail))
            rows = np.repeat([[FIRST, *context, *tail, LAST]], len(tail), 0).astype(
                np.int32
            )
            targets = np.array(tail)
            rows[np.arange(len(tail)), places] = MASK
            logits = np.asarray(compute_logits(params, rows), np.float64)
            logits = logits[np.arange(len(tail)), places]
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            expected = logprobs[np.arange(len(tail)), targets]
            assert score.logprob == pytest.approx(expected.sum(), abs=1e-4)
            assert score.is_greedy == bool((logits.argmax(-1) == targets).all())
    cut, whole = scorer.score([([9] * 40 + [5] * 28, [6] * 3), ([5] * 28, [6] * 3)])
    assert cut.logprob == pytest.approx(whole.logprob, abs=1e-5)
    with pytest.raises(MaxlmError, match="32 tokens"):
        scorer.score([([], [6] * 32)])
