"""Model FLOPs: what the maths needs, whatever the implementation spends."""

from dataclasses import dataclass

from maxlm.models.architectures import ModelConfig
from maxlm.models.params import Params, named


@dataclass(frozen=True)
class Flops:
    """Training FLOPs a token (forward and backward), under both conventions for attention."""

    full: float
    """Causal attention counted as if nothing were masked (Chowdhery et al. 2022, appendix B)."""
    causal: float
    """Attention counted at half, as a causal kernel computes it."""


def training_flops(specs: Params, config: ModelConfig, seq_len: int) -> Flops:
    """FLOPs a token of a training step.

    6 for every weight a token is multiplied with (2 forward, 4 backward): hidden matrices and the
    output head, tied or not, but not table look-ups, norms and biases. Attention's two products
    take their forward FLOPs and twice as many backward.
    """
    flat = named(specs)
    weights = sum(spec.size for spec in flat.values() if spec.role == "matrix")
    weights += config.vocab_size * config.d_model
    attention = 3.0 * config.attention_flops(seq_len)
    return Flops(full=6.0 * weights + attention, causal=6.0 * weights + attention / 2)
