"""Routes of samples stand in a row beside the tokens that met them."""

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.rl.rollouts.packing import RowLayout, pack_samples
from maxlm.rl.routes import (
    declare_routes,
    extend_routes,
    routes_from_arrays,
    routes_to_arrays,
)
from maxlm.rl.samples import Prompt, Sample
from maxlm.rl.tasks.grpo import GrpoTask
from maxlm.tasks import check_task

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


def make_sample(num_tokens: int, routes: np.ndarray | None = None) -> Sample:
    tokens = list(range(num_tokens))
    return Sample(
        prompt=Prompt(0, (0, 1), {}),
        number=0,
        tokens=tokens,
        is_sampled=[token > 1 for token in tokens],
        log_probs=[0.0] * num_tokens,
        versions=[0] * num_tokens,
        is_complete=True,
        routes=[] if routes is None else list(routes),
    )


def make_routes(num_tokens: int, first: int) -> np.ndarray:
    """Token i has first + i everywhere."""
    numbers = np.arange(first, first + num_tokens, dtype=np.int16)[:, None, None]
    return np.broadcast_to(numbers, (num_tokens, 3, 3))


def test_routes_stand_beside_the_tokens_that_met_them():
    """A whole sample, one whose end the engine has not read, one without, and one with
    routes past its row."""
    spec = declare_routes(EXPERTS, seq_len=14)
    assert spec.shape == (14, 3, 3)
    assert spec.dtype == np.int16  # expert 128 is none of int8
    samples = [
        make_sample(5, make_routes(4, first=10)),
        make_sample(6, make_routes(3, first=120)),
        make_sample(4),
        make_sample(8, make_routes(9, first=50)),
    ]
    layout = RowLayout(14, sequences_per_row=2)
    batch = pack_samples(samples, layout, routes=spec)
    expected = [
        [10, 11, 12, 13, 120, 121, 122, *[-1] * 7],
        [-1, -1, -1, 50, 51, 52, 53, 54, 55, 56, *[-1] * 4],
    ]
    want = np.broadcast_to(np.reshape(expected, (2, 14, 1, 1)), (2, 14, 3, 3))
    np.testing.assert_array_equal(batch["routes"], want)
    assert batch["routes"].dtype == np.int16
    assert "routes" not in pack_samples(samples, layout)


def test_a_conversation_keeps_the_routes_that_its_tokens_were_drawn_with():
    sample = make_sample(6)
    # In two parts, then a second turn, whose prompt is computed anew with others: also
    # in two parts, of which the first is known, and a token that is thrown away.
    extend_routes(sample, make_routes(3, first=0), 0)
    extend_routes(sample, make_routes(1, first=3), 3)
    extend_routes(sample, make_routes(2, first=50), 0)
    extend_routes(sample, make_routes(5, first=52), 2)
    numbers = [routes[0, 0] for routes in sample.routes]
    assert numbers == [0, 1, 2, 3, 54, 55]


def test_routes_are_written_and_read_back():
    samples = [
        make_sample(4, make_routes(3, first=0)),
        make_sample(3),
        make_sample(6, make_routes(6, first=80)),
    ]
    arrays = {f"a_{name}": x for name, x in routes_to_arrays(samples).items()}
    assert arrays["a_routes"].dtype == np.int16
    routes = routes_from_arrays(arrays, "a_", 3)
    for sample, sample_routes in zip(samples, routes, strict=True):
        np.testing.assert_equal(sample_routes, sample.routes)
    assert routes_to_arrays(samples[1:2]) == {}
    assert routes_from_arrays({}, "a_", 2) == [[], []]


def test_a_model_without_experts_has_no_routes():
    dense = DecoderConfig.model_validate(SETTINGS)
    replaying = GrpoTask.model_validate(
        {"rewards": [{"kind": "exact_match"}], "replay_routes": True}
    )
    check_task(replaying, EXPERTS, 14)
    check_task(replaying.model_copy(update={"replay_routes": False}), dense, 14)
    with pytest.raises(MaxlmError, match="has no experts") as caught:
        check_task(replaying, dense, 14)
    assert caught.value.where == "task.replay_routes"
    assert "\n" not in str(caught.value)
