"""Ling 3 (inclusionAI 2026, its published code): layers of Kimi Delta Attention whose
decays have a bound, and one of latent attention with a gate of each head behind them, by
turns; experts as DeepSeek-V3's behind dense layers."""

from dataclasses import replace
from typing import Any

from maxlm.huggingface.families import deepseek, fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.modules import FINAL_NORM_MODULES
from maxlm.huggingface.families.names import (
    NameTable,
    copy,
    depthwise,
    either,
    interleave_by_kv_head,
    linear,
    permute_rotary,
)
from maxlm.huggingface.families.qwen_hybrid import (
    FULL,
    LINEAR,
    choose_module_layer,
    read_kinds,
    write_kinds,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.kimi_delta_attention import KimiDeltaAttentionConfig

L = "model.layers.{layer}"
A = f"{L}.attention"
DELTA = "kimi_delta_attention"
_MAPS = {"k": "key", "v": "value", "b": "beta", "f": "decay"}
_CONVS = {"q": "query_conv", "k": "key_conv", "v": "value_conv"}
_GROUP_SIZE = 6
"""Layers of a group, of which the last has latent attention, where the file does not
say."""


def _make_table(config: TransformerConfig) -> NameTable:
    latent = config.attention.latent
    rotary_dim = latent.rotary_dim
    query = permute_rotary(linear("attention.query.kernel"), rotary_dim, each_head=True)
    key_down = permute_rotary(
        linear("attention.key_down.kernel", "attention.key_rotary.kernel"),
        rotary_dim,
        each_head=False,
    )
    # Layers of both kinds have maps of these names.
    delta_query = linear(f"{DELTA}.query.kernel")
    gate = either(linear(f"{DELTA}.gate.kernel"), linear("attention.gate.kernel"))
    out = either(linear(f"{DELTA}.out.kernel"), linear("attention.out.kernel"))
    table: dict[str, Any] = {
        "model.word_embeddings.weight": copy("embedding.table"),
        "model.norm.weight": copy("final_norm.scale"),
        "lm_head.weight": linear("head.kernel"),
        **llama.NORMS,
        **llama.MLP,
        **qwen.EXPERTS,
        **deepseek.SHARED_EXPERTS,
        f"{L}.mlp.gate.expert_bias": copy("moe.selection_bias"),
        f"{A}.g_proj.weight": gate,
        f"{A}.dense.weight": out,
        f"{A}.A_log": copy(f"{DELTA}.A_log"),
        f"{A}.dt_bias": linear(f"{DELTA}.dt_bias"),
        f"{A}.o_norm.weight": copy(f"{DELTA}.norm.scale"),
        f"{A}.kv_a_proj_with_mqa.weight": key_down,
        f"{A}.kv_a_layernorm.weight": copy("attention.key_norm.scale"),
        f"{A}.kv_b_proj.weight": interleave_by_kv_head(
            "attention.key_up.kernel", "attention.value_up.kernel"
        ),
    }
    if latent.q_rank is None:
        table[f"{A}.q_proj.weight"] = either(delta_query, query)
    else:
        table |= {
            f"{A}.q_proj.weight": delta_query,
            f"{A}.q_a_proj.weight": linear("attention.query_down.kernel"),
            f"{A}.q_a_layernorm.weight": copy("attention.query_norm.scale"),
            f"{A}.q_b_proj.weight": query,
        }
    for theirs, ours in _MAPS.items():
        table[f"{A}.{theirs}_proj.weight"] = linear(f"{DELTA}.{ours}.kernel")
    for theirs, ours in _CONVS.items():
        table[f"{A}.{theirs}_conv1d.weight"] = depthwise(f"{DELTA}.{ours}")
    return table


def _list_kinds(num_layers: int, group_size: int) -> list[str]:
    """Returns each layer's kind where the last of a group has attention."""
    numbers = range(1, num_layers + 1)
    return [LINEAR if number % group_size else FULL for number in numbers]


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention = settings["attention"]
    deepseek.read_head_sizes(reader, attention, settings["norm"]["eps"])
    deepseek.read_dense_list(reader, settings, 2)
    # transformers writes another number as head_dim, and this one beside it.
    published_dim = reader.size("head_dim", 128)
    published_width = reader.size("short_conv_kernel_size", 4, least=2)
    mixer: dict[str, Any] = {
        "kind": DELTA,
        "num_heads": reader.size("linear_num_heads", attention["num_heads"]),
        "head_dim": reader.size("linear_head_dim", published_dim),
        "conv_width": reader.size("linear_conv_kernel_dim", published_width, least=2),
        "squeezed": False,
    }
    least = reader.number("kda_lower_bound", -5.0, least=-1000)
    if reader.flag("kda_safe_gate", True):
        mixer["min_log_decay"] = least
    settings["kinds"] = {LINEAR: {"mixer": mixer}}
    group_size = reader.size("layer_group_size", _GROUP_SIZE)
    read_kinds(reader, settings, _list_kinds(settings["num_layers"], group_size))


def _read_module_layer(reader: ConfigReader, settings: dict[str, Any]) -> str | None:
    uses_delta = reader.flag("mtp_use_kda", False)
    return choose_module_layer(settings, LINEAR if uses_delta else FULL)


def _write(config: TransformerConfig) -> dict[str, Any]:
    mixer = fields.find_mixer(config, KimiDeltaAttentionConfig)
    least = mixer.min_log_decay
    kinds = write_kinds(config)
    num_layers = config.num_layers
    values = {
        **kinds,
        **deepseek.write_head_sizes(config.attention),
        **deepseek.write_dense_list(config),
        "head_dim": mixer.head_dim,
        "short_conv_kernel_size": mixer.conv_width,
        "linear_num_heads": mixer.num_heads,
        "linear_head_dim": mixer.head_dim,
        "linear_conv_kernel_dim": mixer.conv_width,
        "kda_safe_gate": least is not None,
    }
    if least is not None:
        values["kda_lower_bound"] = least
    for group_size in range(1, num_layers + 2):
        if _list_kinds(num_layers, group_size) == kinds["layer_types"]:
            # All that the published code reads.
            values["layer_group_size"] = group_size
            break
    return values


BAILING_HYBRID = ModelFamily(
    "bailing_hybrid",
    "BailingHybridForCausalLM",
    {
        **deepseek.LATENT_ATTENTION,
        "vocab_size": fields.map_size("vocab_size", 157_184),
        "num_hidden_layers": fields.map_layer_count("num_layers", 42),
        "hidden_size": fields.map_size("d_model", 2560),
        "max_position_embeddings": fields.map_size(
            "max_seq_len", 262_144, alias="model_max_length"
        ),
        "num_attention_heads": fields.map_size("attention.num_heads", 32),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        # transformers has two tables whatever this says.
        "tie_word_embeddings": fields.require_value(False, ours="tie_embeddings"),
        "attention_bias": fields.require_value(False),
        "q_lora_rank": fields.map_size("attention.latent.q_rank", None, nullable=True),
        "num_experts": fields.map_size(
            "moe.num_experts", 512, alias="num_local_experts"
        ),
        "num_experts_per_tok": fields.map_size(
            "moe.experts_per_token", 8, alias="num_experts_per_token"
        ),
        "num_shared_experts": fields.map_size(
            "moe.shared_experts", 1, alias="n_shared_experts"
        ),
        "moe_intermediate_size": fields.map_size("moe.d_ff", 768),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "n_group": fields.map_size("moe.groups", 8, alias="num_expert_group"),
        "topk_group": fields.map_size("moe.groups_per_token", 4),
        "routed_scaling_factor": fields.map_number("moe.scale", 2.5),
        "moe_renormalize": fields.map_flag("moe.renormalise", True),
        "norm_topk_prob": fields.require_value(True),
        # What the published code could also be.
        "use_bias": fields.require_value(False),
        "use_qkv_bias": fields.require_value(False),
        "no_kda_lora": fields.require_value(True),
        "use_mla_nope": fields.require_value(False),
        "rope_interleave": fields.require_value(True),
        "gated_attention_proj_granularity_type": fields.require_value("head_wise"),
        "score_function": fields.require_value("sigmoid"),
        "scoring_func": fields.require_value("sigmoid"),
        "topk_method": fields.require_value("noaux_tc"),
        "moe_router_enable_expert_bias": fields.require_value(True),
    },
    _make_table,
    {
        **deepseek.SIGMOID_ROUTING,
        "attention.output_gate": "head",
        f"kinds.{LINEAR}.mixer.kind": DELTA,
    },
    rope_kwargs={"theta": 6_000_000.0},
    read_extra=_read,
    write_extra=_write,
    layers_for_more_tokens=L,
    modules=replace(FINAL_NORM_MODULES, read_layer=_read_module_layer),
    ignored_keys=[
        # Which follow from others.
        *("qk_head_dim", "rotary_dim", "partial_rotary_factor"),
        *("moe_shared_expert_intermediate_size", "use_qk_norm", "router_dtype"),
        "mtp_loss_scaling_factor",
        "mtp_use_kda",  # of modules, where there are some
        "pretraining_tp",
    ],
)
