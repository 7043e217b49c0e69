"""Routes of samples stand in a row beside the tokens that met them."""

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.rl.routes import declare_routes, extend_routes, make_row_routes
from maxlm.rl.samples import Prompt, Sample

SETTINGS = {
    "vocab_size": 37,
    "num_layers": 5,
    "d_model": 12,
    "max_seq_len": 16,
    "attention": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 4},
    "mlp": {"d_ff": 20},
}
EXPERTS = DecoderConfig.model_validate(
    SETTINGS
    | {
        "moe": {"num_experts": 129, "experts_per_token": 3, "d_ff": 6},
        "dense_layers": 2,
    }
)


def make_sample(num_tokens: int, routes: np.ndarray | None) -> Sample:
    tokens = list(range(num_tokens))
    return Sample(
        prompt=Prompt(0, (0, 1), {}),
        number=0,
        tokens=tokens,
        is_sampled=[token > 1 for token in tokens],
        log_probs=[0.0] * num_tokens,
        versions=[0] * num_tokens,
        is_complete=True,
        routes=routes,
    )


def make_routes(num_tokens: int, first: int) -> np.ndarray:
    """Token i has first + i everywhere."""
    numbers = np.arange(first, first + num_tokens)[:, None, None]
    return np.broadcast_to(numbers, (num_tokens, 3, 3))


def test_routes_stand_beside_the_tokens_that_met_them():
    """A whole sample, one whose end the engine has not read, and one without."""
    spec = declare_routes(EXPERTS, seq_len=14)
    assert spec.shape == (14, 3, 3)
    assert spec.dtype == np.int16  # expert 128 is none of int8
    samples = [
        make_sample(5, make_routes(4, first=10)),
        make_sample(6, make_routes(3, first=120)),
        make_sample(4, None),
    ]
    routes = make_row_routes(samples, [0, 4, 9], spec)
    expected = [10, 11, 12, 13, 120, 121, 122, -1, -1, -1, -1, -1, -1, -1]
    np.testing.assert_array_equal(
        routes, make_routes(1, 0) + np.reshape(expected, (-1, 1, 1))
    )
    assert routes.dtype == np.int16


def test_a_conversation_keeps_the_routes_that_its_tokens_were_drawn_with():
    first = extend_routes(None, make_routes(4, first=0))
    # The second turn's prompt is computed anew, with other experts.
    both = extend_routes(first, make_routes(7, first=50))
    np.testing.assert_array_equal(both[:, 0, 0], [0, 1, 2, 3, 54, 55, 56])


def test_a_model_without_experts_has_no_routes():
    with pytest.raises(MaxlmError, match="has no experts"):
        declare_routes(DecoderConfig.model_validate(SETTINGS), seq_len=14)
