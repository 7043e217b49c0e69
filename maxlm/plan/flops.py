"""Model FLOPs: what the maths needs, whatever the implementation spends."""

from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.models.architectures import Model, ModelConfig
from maxlm.models.params import ParamSpec, flatten_names, param_specs, select_base
from maxlm.plan.stacks import Stack, list_stacks


@dataclass(frozen=True)
class TrainingFlops:
    """Training FLOPs a token (forward and backward), under both conventions for attention."""

    full: float
    """Causal attention counted as if nothing were masked (Chowdhery et al. 2022, appendix B)."""
    causal: float
    """Causal attention counted at half, as a kernel computes it."""


def count_active_parameters(flat: Mapping[str, ParamSpec], config: ModelConfig) -> float:
    """Parameters that one token meets: all but the routed experts it is not sent to."""
    share = config.expert_share
    return sum(s.size * (share if "expert" in s.axes else 1) for s in flat.values())


def count_training_flops(
    model: Model, seq_len: int, encoder_len: int | None = None
) -> TrainingFlops:
    """FLOPs a token of a training step; of an encoder and a decoder, a token of the decoder's.

    6 for every weight a token is multiplied with (2 forward, 4 backward): hidden matrices, of
    routed experts those a token meets, routers and the output head, tied or not, but not table
    look-ups, norms, biases and what an adapter adds. Attention's two products, and what layers
    state beside, take their forward FLOPs and twice as many backward.

    Args:
        encoder_len: tokens of an encoder beside a decoder; None: as many.
    """
    config, flat = model.config, flatten_names(select_base(param_specs(model)))
    outer = (s.size for s in flat.values() if s.role == "matrix" and not s.lead)
    weights = sum(outer, start=float(config.vocab_size * config.d_model))
    full = causal = 0.0
    for stack in list_stacks(model, seq_len, encoder_len or seq_len):
        for map_ in stack.maps:
            weights += map_.size * map_.depth * map_.rate * (_share(stack) if map_.experts else 1)
        if stack.router is not None:
            weights += stack.router.size * stack.depth * stack.rate
        other = sum(branch.costs.flops for branch in stack.branches) * stack.depth * stack.rate
        full, causal = full + other, causal + other
        for pairs in stack.pairs:
            width = pairs.heads.num_heads * (pairs.heads.head_dim + pairs.heads.value_dim)
            products = 2.0 * width * pairs.layers * pairs.rate * pairs.keys
            full += products
            causal += products * (0.5 if pairs.causal else 1.0)
    return TrainingFlops(full=6.0 * weights + 3 * full, causal=6.0 * weights + 3 * causal)


def _share(stack: Stack) -> float:
    """The share of a layer's routed experts that a token meets."""
    assert stack.experts is not None
    return stack.experts.experts_per_token / stack.experts.num_experts
