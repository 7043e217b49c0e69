"""Granite 4 (IBM 2025): Mamba-2 state spaces with attention between, experts with a
shared one beside them, or the latter alone; factors on embeddings, scores, what
branches add, and logits; without positions but where the file has them."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import bamba, fields, llama, mamba2, rope
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import either, join_experts, linear
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.mamba2 import Mamba2Config

L = "model.layers.{layer}"
_EXPERTS = f"{L}.block_sparse_moe"
_KIND_OF_NAME = {
    "linear_attention": "mamba",
    "full_attention": "attention",
    # As before transformers 5.
    "mamba": "mamba",
    "attention": "attention",
}
TABLE = {
    **llama.OUTER,
    **llama.NORMS,
    **llama.ATTENTION,
    **mamba2.map_mamba2(f"{L}.mamba"),
    f"{_EXPERTS}.router.layer.weight": linear("moe.router"),
    f"{_EXPERTS}.input_linear.weight": join_experts(
        "moe.gate", "moe.up", inputs_first=False
    ),
    f"{_EXPERTS}.output_linear.weight": join_experts("moe.down", inputs_first=False),
    f"{L}.shared_mlp.input_linear.weight": either(
        linear("moe.shared.gate.kernel", "moe.shared.up.kernel"),
        linear("mlp.gate.kernel", "mlp.up.kernel"),
    ),
    f"{L}.shared_mlp.output_linear.weight": either(
        linear("moe.shared.down.kernel"), linear("mlp.down.kernel")
    ),
}


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    mixer = settings["kinds"]["mamba"]["mixer"]
    bamba.read_heads(reader, mixer, bamba.read_expand(reader, settings))
    settings["kinds"]["attention"] = {}
    names = reader.names("layer_types") or reader.names("layers_block_type")
    names = names or ["linear_attention"] * settings["num_layers"]
    for name in names:
        if name not in _KIND_OF_NAME or len(names) != settings["num_layers"]:
            message = f"layer_types={names} does not name each layer's kind"
            fix = (
                f"name {settings['num_layers']}, each one of {', '.join(_KIND_OF_NAME)}"
            )
            raise MaxlmError(message, where=reader.where, fix=fix)
    fields.name_layers(settings, [_KIND_OF_NAME[name] for name in names])

    settings["positions"] = {"kind": "none"}
    if (
        reader.read_implemented("position_embedding_type", None, "rope", "nope")
        == "rope"
    ):
        head_dim = settings["attention"]["head_dim"]
        settings["positions"] = rope.read_position_settings(reader, head_dim)
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        reader.ignore(key)

    activation = fields.read_activation(reader, "hidden_act", "silu")
    shared_width = reader.size("shared_intermediate_size", 1024)
    num_experts = reader.size("num_local_experts", 8, least=0)
    if num_experts == 0:
        settings["mlp"] = {"d_ff": shared_width, "activation": activation}
        return
    per_token = reader.size("num_experts_per_tok", 2)
    settings["moe"] = {
        "num_experts": num_experts,
        "experts_per_token": per_token,
        "d_ff": reader.size("intermediate_size", 11_008),
        "activation": activation,
        "shared_experts": 1,
        "shared_d_ff": shared_width,
        "balance_loss": per_token
        * reader.number("router_aux_loss_coef", 1e-3, least=0),
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds = fields.list_kind_names(config)
    values: dict[str, Any] = {
        **bamba.write_heads(config),
        "mamba_expand": bamba.write_expand(config),
        "layer_types": [
            "full_attention" if kind == "attention" else "linear_attention"
            for kind in kinds
        ],
    }
    if config.positions.kind == "rope":
        head_dim = config.attention.head_dim
        values |= rope.write_position_settings(config.positions, head_dim)
        values["position_embedding_type"] = "rope"
    if config.mlp is not None:
        values["num_local_experts"] = 0
        values["shared_intermediate_size"] = config.mlp.d_ff
        return values
    moe = config.moe
    assert moe is not None
    return values | {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "intermediate_size": moe.d_ff,
        "shared_intermediate_size": moe.shared_d_ff,
        "router_aux_loss_coef": moe.balance_loss / moe.experts_per_token,
    }


GRANITE_HYBRID = ModelFamily(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    {
        **fields.SIZES,
        "max_position_embeddings": fields.map_size("max_seq_len", 2048),
        **llama.map_kv_heads(None),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        "attention_bias": fields.map_flag("attention.bias", False),
        "embedding_multiplier": fields.map_number("embedding_scale", 1.0),
        "attention_multiplier": fields.ConfigField(
            lambda reader, key: reader.number(key, 1.0),
            "attention.scale",
            lambda config: config.attention.scale or config.attention.head_dim**-0.5,
        ),
        "residual_multiplier": fields.map_number("residual_scale", 1.0),
        "logits_scaling": fields.map_inverse("logit_scale", 1.0),
        **fields.map_in_mixer("kinds.mamba.mixer", Mamba2Config, bamba.SETTINGS),
    },
    TABLE,
    {"kinds.mamba.mixer.kind": "mamba2"},
    read_extra=_read,
    write_extra=_write,
    # Experts' keys where there are none, and what the published code does not read.
    ignored_keys=[
        *bamba.INERT,
        *("intermediate_size", "num_experts_per_tok", "router_aux_loss_coef"),
        *("normalization_function", "init_method", "mlp_bias"),
    ],
)
