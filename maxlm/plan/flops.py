"""Model FLOPs: what the maths needs, whatever the implementation spends."""

from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.models.architectures import ModelConfig
from maxlm.models.params import Params, ParamSpec, named


@dataclass(frozen=True)
class Flops:
    """Training FLOPs a token (forward and backward), under both conventions for attention."""

    full: float
    """Causal attention counted as if nothing were masked (Chowdhery et al. 2022, appendix B)."""
    causal: float
    """Attention counted at half, as a causal kernel computes it."""


def active_parameters(flat: Mapping[str, ParamSpec], config: ModelConfig) -> float:
    """Parameters that one token meets: all but the routed experts it is not sent to."""
    share = config.expert_share
    return sum(s.size * (share if "expert" in s.axes else 1) for s in flat.values())


def training_flops(specs: Params, config: ModelConfig, seq_len: int) -> Flops:
    """FLOPs a token of a training step.

    6 for every weight a token is multiplied with (2 forward, 4 backward): hidden matrices, of
    routed experts those a token meets, routers and the output head, tied or not, but not table
    look-ups, norms and biases. Attention's two products take their forward FLOPs and twice as many
    backward.
    """
    flat = named(specs)
    multiplied = {n: s for n, s in flat.items() if s.role == "matrix" or n.endswith(".router")}
    weights = active_parameters(multiplied, config) + config.vocab_size * config.d_model
    attention = 3.0 * config.attention_flops(seq_len)
    return Flops(full=6.0 * weights + attention, causal=6.0 * weights + attention / 2)
