"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with eight experts, two a token."""

from typing import Any

from maxlm.models.architectures.decoder import DecoderConfig
from maxlm.models.families import llama
from maxlm.models.families.family import ModelFamily
from maxlm.models.families.forms import linear
from maxlm.models.families.names import NameTable
from maxlm.models.families.reader import ConfigReader

MOE = "model.layers.{layer}.block_sparse_moe"
TABLE: NameTable = {
    **llama.OUTER,
    **llama.NORMS,
    **llama.ATTENTION,
    f"{MOE}.gate.weight": linear("moe.router"),
    f"{MOE}.experts.{{expert}}.w1.weight": linear("moe.gate"),
    f"{MOE}.experts.{{expert}}.w2.weight": linear("moe.down"),
    f"{MOE}.experts.{{expert}}.w3.weight": linear("moe.up"),
}


def _read(reader: ConfigReader) -> dict[str, Any]:
    settings = llama.read_common(reader, kv_heads=8, theta=1_000_000.0)
    settings["attention"] |= {"window": reader.size("sliding_window", None)}
    experts = reader.size("num_local_experts", also="num_experts")
    k = reader.size("num_experts_per_tok")
    reader.require("router_jitter_noise", 0.0)
    settings["moe"] = {
        "num_experts": experts,
        "experts_per_token": k,
        **llama.read_swiglu(reader),
        # Its shares of assignments sum to k, ours to 1.
        "balance_loss": reader.number("router_aux_loss_coef", 0.001, least=0) * k,
    }
    return settings


def _write(config: DecoderConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    return {
        **llama.write_common(config),
        "sliding_window": config.attention.window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "intermediate_size": moe.d_ff,
        "hidden_act": moe.activation,
        "router_aux_loss_coef": moe.balance_loss / moe.experts_per_token,
    }


MIXTRAL = ModelFamily(
    "mixtral",
    "mixtral",
    "MixtralForCausalLM",
    _read,
    _write,
    llama.tie_embeddings(TABLE),
    llama.BUFFERS,
)
