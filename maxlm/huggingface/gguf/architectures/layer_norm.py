"""Architectures with LayerNorm: GPT-2, GPT-NeoX, Falcon, BLOOM, Phi-2, StarCoder 2,
StableLM, Command R."""

from typing import Any

from maxlm.huggingface.gguf.architectures.architecture import (
    FFN,
    KV_HEADS,
    Architecture,
    map_layer_norm,
    map_sizes,
)
from maxlm.huggingface.gguf.architectures.llama import (
    ATTENTION,
    MLP,
    NORMS,
    OUTER,
    QK_NORMS,
    SIZES,
    WEIGHT,
    B,
    L,
    describe_window,
    has_tensor,
    map_layers,
)
from maxlm.huggingface.gguf.metadata import (
    ConfigValues,
    GgufMetadata,
    MetadataKey,
    Number,
)
from maxlm.huggingface.gguf.names import NameRule, NameRules, map_parts
from maxlm.huggingface.gguf.rows import QueriesFirst


def _map_conv1d(name: str, theirs: str) -> NameRules:
    """Maps of GPT-2, whose inputs come first there."""
    return (
        NameRule(f"{B}.{name}.weight", f"{theirs}.weight", is_transposed=True),
        NameRule(f"{B}.{name}.bias", f"{theirs}.bias"),
    )


_H = "transformer.h.{layer}"
_TANH = "gelu_pytorch_tanh"
GPT2 = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    "gpt2",
    (
        *map_sizes("n_layer", "n_embd", "n_positions", "n_head"),
        MetadataKey("feed_forward_length", "n_inner"),
        map_layer_norm("layer_norm_epsilon"),
    ),
    (
        NameRule("token_embd.weight", "transformer.wte.weight"),
        NameRule("position_embd.weight", "transformer.wpe.weight"),
        *map_layers((("attn_norm", "ln_1"), ("ffn_norm", "ln_2")), _H),
        *_map_conv1d("attn_qkv", f"{_H}.attn.c_attn"),
        *_map_conv1d("attn_output", f"{_H}.attn.c_proj"),
        *_map_conv1d("ffn_up", f"{_H}.mlp.c_fc"),
        *_map_conv1d("ffn_down", f"{_H}.mlp.c_proj"),
        *map_parts("output_norm", "transformer.ln_f"),
    ),
    {"activation_function": "gelu_new"},
    is_rotary=False,
    tie_key=None,
    width_key="n_embd",
    heads_key="n_head",
)


def _order_queries_first(values: ConfigValues) -> QueriesFirst:
    return QueriesFirst(values["num_attention_heads"], 1)


def _order_bloom(values: ConfigValues) -> QueriesFirst:
    return QueriesFirst(values["n_head"], 1)


def _read_neox(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    values["use_parallel_residual"] = metadata.read_flag(
        "use_parallel_residual", default=True
    )


def _write_neox(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    metadata["use_parallel_residual"] = values["use_parallel_residual"]
    return []


_N = "gpt_neox.layers.{layer}"
GPT_NEOX = Architecture(
    "gptneox",
    "GPTNeoXForCausalLM",
    "gpt_neox",
    (*map_sizes(), FFN, map_layer_norm("layer_norm_eps")),
    (
        NameRule("token_embd.weight", "gpt_neox.embed_in.weight"),
        *map_layers(
            (
                ("attn_norm", "input_layernorm"),
                ("attn_output", "attention.dense"),
                ("ffn_norm", "post_attention_layernorm"),
                ("ffn_up", "mlp.dense_h_to_4h"),
                ("ffn_down", "mlp.dense_4h_to_h"),
            ),
            _N,
        ),
        *map_parts(
            f"{B}.attn_qkv",
            f"{_N}.attention.query_key_value",
            make_row_order=_order_queries_first,
        ),
        *map_parts("output_norm", "gpt_neox.final_layer_norm"),
        NameRule("output.weight", "embed_out.weight"),
    ),
    {"hidden_act": "gelu", "attention_bias": True},
    partial_key="rotary_pct",
    theta_key="rotary_emb_base",
    read_extra=_read_neox,
    write_extra=_write_neox,
)


def _count_falcon_kv_heads(values: ConfigValues) -> int:
    if values["new_decoder_architecture"]:
        return values["num_kv_heads"]
    return 1 if values["multi_query"] else values["num_attention_heads"]


def _order_falcon(values: ConfigValues) -> QueriesFirst:
    kv_heads = _count_falcon_kv_heads(values)
    return QueriesFirst(kv_heads, values["num_attention_heads"] // kv_heads)


def _has_two_falcon_norms(values: ConfigValues) -> bool:
    return values["num_ln_in_parallel_attn"] == 2


def _has_one_falcon_norm(values: ConfigValues) -> bool:
    return not _has_two_falcon_norms(values)


def _read_falcon(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    num_heads = values["num_attention_heads"]
    kv_heads = metadata.read_size("attention.head_count_kv", 1)
    has_two_norms = has_tensor(metadata, "attn_norm_2.weight")
    is_new = has_two_norms or kv_heads not in (1, num_heads)
    values |= {
        "num_kv_heads": kv_heads,
        "new_decoder_architecture": is_new,
        "multi_query": kv_heads == 1,
        "parallel_attn": True,
        "num_ln_in_parallel_attn": 2 if has_two_norms else 1,
    }
    metadata.ignore("tensor_data_layout")


def _write_falcon(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    if not (values["parallel_attn"] or values["new_decoder_architecture"]):
        raise FALCON.refuse("parallel_attn", False)
    metadata["attention.head_count_kv"] = _count_falcon_kv_heads(values)
    metadata["tensor_data_layout"] = "jploski"
    return []


FALCON = Architecture(
    "falcon",
    "FalconForCausalLM",
    "falcon",
    (
        *map_sizes(),
        MetadataKey("feed_forward_length", "ffn_hidden_size"),
        map_layer_norm("layer_norm_epsilon"),
    ),
    (
        NameRule("token_embd.weight", "transformer.word_embeddings.weight"),
        # One norm a layer (7B), or two (40B), of which llama.cpp calls that of
        # attention the second.
        *map_parts(
            f"{B}.attn_norm", f"{_H}.input_layernorm", is_used=_has_one_falcon_norm
        ),
        *map_parts(f"{B}.attn_norm", f"{_H}.ln_mlp", is_used=_has_two_falcon_norms),
        *map_parts(f"{B}.attn_norm_2", f"{_H}.ln_attn"),
        *map_parts(
            f"{B}.attn_qkv",
            f"{_H}.self_attention.query_key_value",
            WEIGHT,
            make_row_order=_order_falcon,
        ),
        *map_layers(
            (
                ("attn_output", "self_attention.dense"),
                ("ffn_up", "mlp.dense_h_to_4h"),
                ("ffn_down", "mlp.dense_4h_to_h"),
            ),
            _H,
        ),
        *map_parts("output_norm", "transformer.ln_f"),
        NameRule("output.weight", "lm_head.weight"),
    ),
    {"activation": "gelu", "bias": False, "alibi": False},
    read_extra=_read_falcon,
    write_extra=_write_falcon,
)


def _read_bloom(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    metadata.ignore("feed_forward_length", "attention.head_count_kv")


def _write_bloom(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    metadata["feed_forward_length"] = 4 * values["hidden_size"]
    metadata["attention.head_count_kv"] = values["n_head"]
    return []


BLOOM = Architecture(
    "bloom",
    "BloomForCausalLM",
    "bloom",
    (
        *map_sizes("n_layer", "hidden_size", "seq_length", "n_head"),
        map_layer_norm("layer_norm_epsilon"),
    ),
    (
        NameRule("token_embd.weight", "transformer.word_embeddings.weight"),
        *map_parts("token_embd_norm", "transformer.word_embeddings_layernorm"),
        *map_parts(
            f"{B}.attn_qkv",
            f"{_H}.self_attention.query_key_value",
            make_row_order=_order_bloom,
        ),
        *map_layers(
            (
                ("attn_norm", "input_layernorm"),
                ("attn_output", "self_attention.dense"),
                ("ffn_norm", "post_attention_layernorm"),
                ("ffn_up", "mlp.dense_h_to_4h"),
                ("ffn_down", "mlp.dense_4h_to_h"),
            ),
            _H,
        ),
        *map_parts("output_norm", "transformer.ln_f"),
    ),
    is_rotary=False,
    tie_key=None,
    heads_key="n_head",
    read_extra=_read_bloom,
    write_extra=_write_bloom,
)
PHI2 = Architecture(
    "phi2",
    "PhiForCausalLM",
    "phi",
    (*map_sizes(), KV_HEADS, FFN, map_layer_norm("layer_norm_eps")),
    (
        NameRule("token_embd.weight", "model.embed_tokens.weight"),
        *ATTENTION[:6],
        *map_layers(
            (
                ("attn_norm", "input_layernorm"),
                ("attn_output", "self_attn.dense"),
                ("ffn_up", "mlp.fc1"),
                ("ffn_down", "mlp.fc2"),
            ),
            L,
        ),
        *map_parts("output_norm", "model.final_layernorm"),
        *map_parts("output", "lm_head"),
    ),
    {"hidden_act": "gelu_new", "qk_layernorm": False},
    partial_key="partial_rotary_factor",
)


def _read_starcoder2(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    values["use_bias"] = has_tensor(metadata, "attn_q.bias")
    values["sliding_window"] = None


def _write_starcoder2(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    return describe_window(values)


STARCODER2 = Architecture(
    "starcoder2",
    "Starcoder2ForCausalLM",
    "starcoder2",
    (*SIZES, FFN, map_layer_norm("norm_epsilon")),
    (
        *OUTER,
        *NORMS,
        *ATTENTION,
        *map_layers((("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")), L),
    ),
    {"hidden_act": _TANH},
    read_extra=_read_starcoder2,
    write_extra=_write_starcoder2,
)


def _read_stablelm(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    values["use_qkv_bias"] = has_tensor(metadata, "attn_q.bias")
    values["use_parallel_residual"] = not has_tensor(metadata, "ffn_norm.weight")
    metadata.ignore("use_parallel_residual")


def _write_stablelm(values: ConfigValues, metadata: dict[str, Number]) -> list[str]:
    metadata["use_parallel_residual"] = values["use_parallel_residual"]
    return []


STABLELM = Architecture(
    "stablelm",
    "StableLmForCausalLM",
    "stablelm",
    (*map_sizes(), KV_HEADS, FFN, map_layer_norm("layer_norm_eps")),
    (*OUTER, *NORMS, *ATTENTION, *MLP),
    {"hidden_act": "silu"},
    partial_key="partial_rotary_factor",
    read_extra=_read_stablelm,
    write_extra=_write_stablelm,
)


def _read_command_r(metadata: GgufMetadata, values: dict[str, Any]) -> None:
    values["use_qk_norm"] = has_tensor(metadata, "attn_q_norm.weight")


COMMAND_R = Architecture(
    "command-r",
    "CohereForCausalLM",
    "cohere",
    (
        *map_sizes(),
        KV_HEADS,
        FFN,
        map_layer_norm("layer_norm_eps"),
        MetadataKey("logit_scale", "logit_scale", "number"),
    ),
    # Both turn neighbouring dimensions: rows stand as they are.
    (
        *OUTER,
        *map_parts(f"{B}.attn_norm", f"{L}.input_layernorm", WEIGHT),
        *ATTENTION,
        *QK_NORMS,
        *MLP,
    ),
    {"hidden_act": "silu", "attention_bias": False},
    read_extra=_read_command_r,
)
