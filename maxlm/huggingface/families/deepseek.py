"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, arXiv 2405.04434): latent attention, many
small experts with shared ones beside them, a dense layer first. DeepSeek-V3 and R1
(DeepSeek-AI 2024, arXiv 2412.19437) and Kimi K2 (Kimi Team 2025, arXiv 2507.20534):
experts scored by sigmoids, chosen with a bias that balances them, from few groups.
GLM-4.7-Flash (Z.ai 2026, its published code and weights) has the same layers."""

from dataclasses import replace
from typing import Any

from maxlm.huggingface.families import fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.modules import DEEPSEEK_MODULES
from maxlm.huggingface.families.names import (
    NameTable,
    copy,
    interleave_by_kv_head,
    linear,
    map_linear,
    map_linears,
    permute_rotary,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.attention_config import AttentionConfig, LatentConfig

L = "model.layers.{layer}"
A = f"{L}.self_attn"
SHARED_EXPERTS = map_linears(
    f"{L}.mlp.shared_experts", "moe.shared", **llama.SWIGLU_NAMES
)
SELECTION_BIAS = {
    f"{L}.mlp.gate.e_score_correction_bias": copy("moe.selection_bias"),
}
_DENSE, _SPARSE = "dense", "sparse"
_LATENT_NORM_EPS = 1e-6
"""That of the norms of narrow vectors, whatever the file says of the others."""


def map_latent_layers(latent: LatentConfig) -> NameTable:
    """Returns the entries of a model with latent attention and experts."""
    query = permute_rotary(
        linear("attention.query.kernel"), latent.rotary_dim, each_head=True
    )
    # Without a low rank of queries, one map makes them.
    query_name = "q_proj" if latent.q_rank is None else "q_b_proj"
    key_down = permute_rotary(
        linear("attention.key_down.kernel", "attention.key_rotary.kernel"),
        latent.rotary_dim,
        each_head=False,
    )
    key_down_bias = permute_rotary(
        linear("attention.key_down.bias", "attention.key_rotary.bias"),
        latent.rotary_dim,
        each_head=False,
    )
    return {
        **llama.OUTER,
        **llama.NORMS,
        **llama.MLP,
        **qwen.EXPERTS,
        f"{A}.{query_name}.weight": query,
        **map_linear(f"{A}.q_a_proj", "attention.query_down"),
        f"{A}.q_a_layernorm.weight": copy("attention.query_norm.scale"),
        f"{A}.kv_a_proj_with_mqa.weight": key_down,
        f"{A}.kv_a_proj_with_mqa.bias": key_down_bias,
        f"{A}.kv_a_layernorm.weight": copy("attention.key_norm.scale"),
        f"{A}.kv_b_proj.weight": interleave_by_kv_head(
            "attention.key_up.kernel", "attention.value_up.kernel"
        ),
        **map_linear(f"{A}.o_proj", "attention.out"),
        **SHARED_EXPERTS,
    }


def _table(config: TransformerConfig) -> NameTable:
    return map_latent_layers(config.attention.latent)


def _v3_table(config: TransformerConfig) -> NameTable:
    return {**_table(config), **SELECTION_BIAS}


def map_sigmoid_routing(
    *, groups: int | None, groups_per_token: int | None
) -> fields.ConfigFields:
    """Declares the keys of experts that are scored by sigmoids; ``groups`` and
    ``groups_per_token``: where the file does not say."""
    return {
        "num_experts_per_tok": fields.map_size("moe.experts_per_token"),
        "moe_intermediate_size": fields.map_size("moe.d_ff"),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "n_group": fields.map_size("moe.groups", groups),
        "topk_group": fields.map_size("moe.groups_per_token", groups_per_token),
        "routed_scaling_factor": fields.map_number("moe.scale", 1.0),
    }


LATENT_ATTENTION = {
    "attention_bias": fields.map_flag("attention.bias", False),
    "q_lora_rank": fields.map_size("attention.latent.q_rank", nullable=True),
    "kv_lora_rank": fields.map_size("attention.latent.kv_rank"),
    "qk_rope_head_dim": fields.map_size("attention.latent.rotary_dim"),
    "v_head_dim": fields.map_size("attention.latent.value_dim"),
}
"""Keys of latent attention."""

SIGMOID_ROUTING = {
    "moe.score": "sigmoid",
    "moe.selection_bias": True,
    "moe.group_score": "top2",
    # Beside the bias, in training; DeepSeek-V3's (§4.2), which it takes by sequence.
    "moe.balance_loss": 0.0001,
}
"""What the published code has without a key."""


def read_dense_layers(
    reader: ConfigReader, settings: dict[str, Any], default: int
) -> None:
    """Reads the number of first layers that are dense, and their width."""
    dense_layers = reader.size("first_k_dense_replace", default, least=0)
    settings["dense_layers"] = dense_layers
    d_ff = reader.size("intermediate_size")
    if dense_layers:
        settings["mlp"] = {"d_ff": d_ff}


def write_dense_layers(config: TransformerConfig) -> dict[str, Any]:
    """Writes what :func:`read_dense_layers` reads."""
    moe = config.moe
    assert moe is not None
    mlp = config.mlp
    # Without dense layers nothing reads the width.
    d_ff = moe.d_ff if mlp is None else mlp.d_ff
    return {"first_k_dense_replace": config.dense_layers, "intermediate_size": d_ff}


def read_dense_list(
    reader: ConfigReader, settings: dict[str, Any], default: int
) -> None:
    """Reads the first layers that are dense from a list of all layers, or their number;
    dense layers behind others are refused."""
    read_dense_layers(reader, settings, default)
    kinds = reader.names("mlp_layer_types")
    if not kinds:
        return
    num_layers = settings["num_layers"]
    num_dense = kinds.index(_SPARSE) if _SPARSE in kinds else num_layers
    expected = [_DENSE] * num_dense + [_SPARSE] * (num_layers - num_dense)
    reader.read_implemented("mlp_layer_types", expected)
    settings["dense_layers"] = num_dense
    settings.pop("mlp", None)
    if num_dense:
        settings["mlp"] = {"d_ff": reader.size("intermediate_size")}


def write_dense_list(config: TransformerConfig) -> dict[str, Any]:
    """Writes what :func:`read_dense_list` reads."""
    num_sparse = config.num_layers - config.dense_layers
    kinds = [_DENSE] * config.dense_layers + [_SPARSE] * num_sparse
    return {**write_dense_layers(config), "mlp_layer_types": kinds}


def _read_v3(reader: ConfigReader, settings: dict[str, Any]) -> None:
    read_head_sizes(reader, settings["attention"], settings["norm"]["eps"])
    read_dense_layers(reader, settings, 3)


def _read_glm(reader: ConfigReader, settings: dict[str, Any]) -> None:
    read_head_sizes(reader, settings["attention"], settings["norm"]["eps"])
    if not reader.has("mlp_layer_types"):
        # The library has one dense layer then, whatever the number.
        reader.read_implemented("first_k_dense_replace", 1, None)
    read_dense_list(reader, settings, 1)


def read_head_sizes(
    reader: ConfigReader, attention: dict[str, Any], norm_eps: float
) -> None:
    """Reads into settings of latent attention the sizes of its heads, and the eps of
    its norms where that is not ``norm_eps``, the others'."""
    num_heads = attention["num_heads"]
    attention["num_kv_heads"] = reader.read_implemented(
        "num_key_value_heads", num_heads
    )
    latent = attention["latent"]
    # Here a head's size counts the dimensions that turn, too.
    attention["head_dim"] = reader.size("qk_nope_head_dim") + latent["rotary_dim"]
    if norm_eps != _LATENT_NORM_EPS:
        latent["norm_eps"] = _LATENT_NORM_EPS


def _write_v3(config: TransformerConfig) -> dict[str, Any]:
    return {**write_head_sizes(config.attention), **write_dense_layers(config)}


def _write_glm(config: TransformerConfig) -> dict[str, Any]:
    return {**write_head_sizes(config.attention), **write_dense_list(config)}


def write_head_sizes(attention: AttentionConfig) -> dict[str, Any]:
    """Writes what :func:`read_head_sizes` reads."""
    latent = attention.latent
    assert latent is not None
    return {
        "num_key_value_heads": attention.num_heads,
        "qk_nope_head_dim": attention.head_dim - latent.rotary_dim,
    }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention = settings["attention"]
    rotary_dim = attention["latent"]["rotary_dim"]
    reader.read_implemented("num_key_value_heads", attention["num_heads"])
    # Here a head's size counts the dimensions that turn, too.
    attention["head_dim"] = reader.size("qk_nope_head_dim") + rotary_dim
    method = reader.read_implemented("topk_method", "greedy", "group_limited_greedy")
    groups = reader.size("n_group", None)
    groups_per_token = reader.size("topk_group", None)
    # Where a token may use all groups, they limit nothing.
    if method != "greedy" and groups != groups_per_token:
        settings["moe"] |= {"groups": groups, "groups_per_token": groups_per_token}
    dense_layers = reader.size("first_k_dense_replace", 0, least=0)
    settings["dense_layers"] = dense_layers
    mlp = {
        "d_ff": reader.size("intermediate_size", 11_008),
        "bias": reader.read_implemented("mlp_bias", False),
    }
    if dense_layers:
        settings["mlp"] = mlp


def _write(config: TransformerConfig) -> dict[str, Any]:
    attention = config.attention
    moe = config.moe
    assert moe is not None
    limits_groups = moe.groups_per_token < moe.groups
    values = {
        "num_key_value_heads": attention.num_heads,
        # A head's size counts the dimensions that turn, too; this key does not.
        "qk_nope_head_dim": attention.head_dim - attention.latent.rotary_dim,
        "topk_method": "group_limited_greedy" if limits_groups else "greedy",
        "n_group": moe.groups,
        "topk_group": moe.groups_per_token,
        "first_k_dense_replace": config.dense_layers,
    }
    if config.mlp is not None:
        values["intermediate_size"] = config.mlp.d_ff
    return values


DEEPSEEK_V2 = ModelFamily(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    {
        **fields.SIZES,
        **LATENT_ATTENTION,
        "moe_intermediate_size": fields.map_size("moe.d_ff"),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "n_routed_experts": fields.map_size("moe.num_experts"),
        "num_experts_per_tok": fields.map_size("moe.experts_per_token"),
        "n_shared_experts": fields.ConfigField(
            lambda reader, key: reader.size(key, 2, nullable=True),
            "moe.shared_experts",
            lambda config: config.moe.shared_experts or None,
        ),
        # Published with all; implementations differ in true.
        "norm_topk_prob": fields.require_value(False, ours="moe.renormalise"),
        "routed_scaling_factor": fields.map_number("moe.scale", 1.0),
        "aux_loss_alpha": fields.map_number("moe.balance_loss", 0.001, least=0),
        "rms_norm_eps": fields.require_value(1e-6, ours="norm.eps"),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        "scoring_func": fields.require_value("softmax"),
        "moe_layer_freq": fields.require_value(1),
    },
    _table,
    rope_kwargs={},
    read_extra=_read,
    write_extra=_write,
    ignored_tensors=llama.BUFFERS,
    ignored_keys=["head_dim", "qk_head_dim"],  # which follow from others
)
DEEPSEEK_V3 = ModelFamily(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    {
        **fields.SIZES,
        **map_sigmoid_routing(groups=8, groups_per_token=4),
        **LATENT_ATTENTION,
        "n_routed_experts": fields.map_size("moe.num_experts"),
        "n_shared_experts": fields.map_size("moe.shared_experts", 1),
        "norm_topk_prob": fields.map_flag("moe.renormalise", True),
        "routed_scaling_factor": fields.map_number("moe.scale", 2.5),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", False),
        "scoring_func": fields.require_value("sigmoid"),
        "topk_method": fields.require_value("noaux_tc"),
        "moe_layer_freq": fields.require_value(1),
        "rope_interleave": fields.require_value(True),
    },
    _v3_table,
    SIGMOID_ROUTING,
    rope_kwargs={},
    read_extra=_read_v3,
    write_extra=_write_v3,
    ignored_tensors=llama.BUFFERS,
    layers_for_more_tokens=L,
    modules=DEEPSEEK_MODULES,
    other_model_types=["kimi_k2"],
    ignored_keys=[
        *("head_dim", "qk_head_dim"),  # which follow from others
        "aux_loss_alpha",  # of losses
    ],
)
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    name="glm4_moe_lite",
    hf_architecture="Glm4MoeLiteForCausalLM",
    fields={
        **DEEPSEEK_V3.fields,
        **map_sigmoid_routing(groups=1, groups_per_token=1),
        "routed_scaling_factor": fields.map_number("moe.scale", 1.8),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
    },
    read_extra=_read_glm,
    write_extra=_write_glm,
    other_model_types=[],
)
