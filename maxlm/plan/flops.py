"""Model FLOPs: what the maths needs, whatever the implementation spends."""

from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.models.architectures import ModelConfig
from maxlm.models.params import Params, ParamSpec, flatten_names
from maxlm.plan.stacks import has_encoder_inputs


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
    specs: Params, config: ModelConfig, seq_len: int, encoder_len: int | None = None
) -> TrainingFlops:
    """FLOPs a token of a training step; of an encoder and a decoder, a token of the decoder's.

    6 for every weight a token is multiplied with (2 forward, 4 backward): hidden matrices, of
    routed experts those a token meets, routers and the output head, tied or not, but not table
    look-ups, norms and biases. Attention's two products take their forward FLOPs and twice as many
    backward.

    Args:
        encoder_len: tokens of an encoder beside a decoder; None: as many.
    """
    flat = flatten_names(specs)
    multiplied = {n: s for n, s in flat.items() if s.role == "matrix" or n.endswith(".router")}
    inputs = {n: s for n, s in multiplied.items() if has_encoder_inputs(n, config)}
    own = {n: s for n, s in multiplied.items() if n not in inputs}
    lengths = seq_len, encoder_len or seq_len
    weights = count_active_parameters(own, config) + config.vocab_size * config.d_model
    weights += count_active_parameters(inputs, config) * lengths[1] / seq_len
    full, causal = (3 * config.attention_flops(*lengths, causal=share) for share in (1.0, 0.5))
    return TrainingFlops(full=6.0 * weights + full, causal=6.0 * weights + causal)
