"""ERNIE 4.5's mixtures of experts (Baidu ERNIE Team 2025, technical report of ERNIE
4.5): neighbouring dimensions turned, experts scored by a softmax and chosen with a bias,
dense layers before the others or between them."""

from typing import Any

from maxlm.huggingface.families import deepseek, fields, llama, qwen
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import NameTable, copy
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig

L = "model.layers.{layer}"
DENSE, EXPERTS = "dense", "experts"


def _table(config: TransformerConfig) -> NameTable:
    return {
        **llama.OUTER,
        **llama.NORMS,
        **llama.map_paired_attention(config),
        **llama.MLP,
        **qwen.EXPERTS,
        **deepseek.SHARED_EXPERTS,
        f"{L}.mlp.moe_statics.e_score_correction_bias": copy(
            "moe.selection_bias", as_row=True
        ),
    }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    num_layers = settings["num_layers"]
    first = reader.size("moe_layer_start_index", 1, least=0)
    last = reader.number("moe_layer_end_index", -1, least=-1)
    interval = reader.size("moe_layer_interval", 1)
    if last == -1:
        last = num_layers - 1
    has_experts = [
        first <= layer <= last and (layer + 1) % interval == 0
        for layer in range(num_layers)
    ]
    d_ff = reader.size("intermediate_size")
    num_dense = has_experts.index(True) if any(has_experts) else num_layers
    if not all(has_experts):
        settings["mlp"] = {"d_ff": d_ff}
    if all(has_experts[num_dense:]):
        settings["dense_layers"] = num_dense
    else:
        settings["kinds"] = {DENSE: {"ffn": "mlp"}, EXPERTS: {"ffn": "moe"}}
        settings["pattern"] = [
            EXPERTS if is_sparse else DENSE for is_sparse in has_experts
        ]


def _write(config: TransformerConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    mlp = config.mlp
    sparse = [
        number for number, name in enumerate(_list_kinds(config)) if name == EXPERTS
    ]
    first, last = sparse[0], sparse[-1]
    interval = sparse[1] - first if len(sparse) > 1 else 1
    return {
        "intermediate_size": moe.d_ff if mlp is None else mlp.d_ff,
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": interval,
    }


def _list_kinds(config: TransformerConfig) -> list[str]:
    """Lists each layer's feed-forward: dense or experts."""
    if not config.pattern:
        num_sparse = config.num_layers - config.dense_layers
        return [DENSE] * config.dense_layers + [EXPERTS] * num_sparse
    kinds = fields.list_layer_kinds(config)
    return [DENSE if kind.ffn == "mlp" else EXPERTS for kind in kinds]


ERNIE4_5_MOE = ModelFamily(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(4),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
        # Those of experts have none there.
        "use_bias": fields.require_value(False, ours="attention.bias"),
        "moe_num_experts": fields.map_size("moe.num_experts", alias="num_experts"),
        "moe_k": fields.map_size("moe.experts_per_token", alias="num_experts_per_tok"),
        "moe_intermediate_size": fields.map_size("moe.d_ff"),
        "moe_num_shared_experts": fields.map_size("moe.shared_experts", 2, least=0),
        "hidden_act": fields.require_value("silu", ours="moe.activation"),
        "router_aux_loss_coef": fields.map_balance_loss(0.001, "moe_k"),
        # A floor of the weights' sum that no softmax reaches.
        "moe_norm_min": fields.require_value(1e-12),
        "moe_use_aux_free": fields.require_value(True),
        "moe_gate": fields.require_value("topk"),
    },
    _table,
    {"moe.selection_bias": True},
    rope_kwargs={"theta": 500_000.0},
    read_extra=_read,
    write_extra=_write,
    ignored_tensors=["model.mtp*"],
    ignored_keys=[
        *("compression_ratio", "moe_capacity", "num_nextn_predict_layers"),
    ],
)
