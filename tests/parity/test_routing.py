"""Routing alone against transformers' routers, in float64: which experts a token meets,
and with what weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DeepseekV3Config, GptOssConfig  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (  # noqa: E402
    DeepseekV3TopkRouter,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter  # noqa: E402

from maxlm.models.layers.moe import MoeConfig, route  # noqa: E402
from tests.parity.measure import all_double  # noqa: E402

TOKENS, WIDTH, EXPERTS, CHOSEN = 41, 7, 12, 3
SIZES: dict[str, Any] = {
    "num_experts": EXPERTS,
    "experts_per_token": CHOSEN,
    "d_ff": 5,
}


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def route_here(logits: np.ndarray, bias: np.ndarray | None, config: MoeConfig) -> Any:
    """(weights, expert numbers) [T, k], each token's experts in ascending order."""
    with jax.enable_x64(True):
        routing = route(
            jnp.asarray(logits[None]),
            None if bias is None else jnp.asarray(bias),
            config,
        )
        assert routing.weights.dtype == jnp.float64
        return sort_by_expert(routing.weights[0], routing.expert_ids[0])


def sort_by_expert(weights: Any, numbers: Any) -> tuple[np.ndarray, np.ndarray]:
    weights = np.asarray(weights)
    numbers = np.asarray(numbers)
    order = np.argsort(numbers, axis=1)
    return np.take_along_axis(weights, order, 1), np.take_along_axis(numbers, order, 1)


def route_there(router: Any, x: np.ndarray) -> Any:
    """(weights, expert numbers) of a router of transformers."""
    with torch.no_grad():
        _, weights, numbers = router(torch.tensor(x))
    return sort_by_expert(weights.numpy(), numbers.numpy())


def build_v3_router(
    kernel: np.ndarray, bias: np.ndarray, groups: int, groups_per_token: int
) -> Any:
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        routed_scaling_factor=2.5,
        n_group=groups,
        topk_group=groups_per_token,
    )
    router = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(kernel.T))
        router.e_score_correction_bias.copy_(torch.tensor(bias))
    return router


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_groups_chosen_by_biased_scores_of_either_sign(groups, shift):
    """Below zero, a fill of zeros would choose experts of groups that are left out."""
    x = draw(TOKENS, WIDTH, seed=0)
    kernel = draw(WIDTH, EXPERTS, seed=1)
    bias = 0.2 * draw(EXPERTS, seed=2) + shift
    few = 2 if groups > 1 else 1
    config = MoeConfig(
        **SIZES,
        score="sigmoid",
        scale=2.5,
        selection_bias=True,
        groups=groups,
        groups_per_token=few,
        group_score="top2",
    )
    with all_double():
        router = build_v3_router(kernel, bias, groups, few)
        there = route_there(router, x)
    here = route_here(x @ kernel, bias, config)
    np.testing.assert_array_equal(here[1], there[1])
    np.testing.assert_allclose(here[0], there[0], rtol=1e-12)


def test_experts_that_tie_serve_with_the_same_weights():
    """Each kernel is there twice: which of the two is chosen is nobody's promise."""
    x = draw(TOKENS, WIDTH, seed=3)
    kernel = np.repeat(draw(WIDTH, EXPERTS // 2, seed=4), 2, axis=1)
    bias = np.repeat(0.2 * draw(EXPERTS // 2, seed=5), 2)
    config = MoeConfig(
        **SIZES,
        score="sigmoid",
        scale=2.5,
        selection_bias=True,
        groups=3,
        groups_per_token=2,
        group_score="top2",
    )
    with all_double():
        router = build_v3_router(kernel, bias, 3, 2)
        there, _ = route_there(router, x)
    here, _ = route_here(x @ kernel, bias, config)
    np.testing.assert_allclose(np.sort(here), np.sort(there), rtol=1e-12)


def test_softmax_over_the_chosen_logits_is_a_renormalised_softmax():
    x = draw(TOKENS, WIDTH, seed=6)
    kernel = draw(WIDTH, EXPERTS, seed=7)
    bias = draw(EXPERTS, seed=8)
    with all_double():
        settings = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
        router = GptOssTopKRouter(GptOssConfig(hidden_size=WIDTH, **settings))
        with torch.no_grad():
            router.weight.copy_(torch.tensor(kernel.T))
            router.bias.copy_(torch.tensor(bias))
        there = route_there(router, x)
    # There the bias is in the logits.
    here = route_here(x @ kernel + bias, None, MoeConfig(**SIZES))
    np.testing.assert_array_equal(here[1], there[1])
    np.testing.assert_allclose(here[0], there[0], rtol=1e-12)
