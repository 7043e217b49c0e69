"""DeepSeek-V3.2 (DeepSeek-AI 2025, arXiv 2512.02556): DeepSeek-V3 whose attention is to
the tokens that an indexer chooses. GLM-5 (Z.ai 2026, its published code and weights) has
the same layers, and turns neighbouring dimensions of the indexer's heads.

The published indexer multiplies its queries and keys by one Hadamard matrix before it
rounds them to fp8; without the rounding that changes no score, and it is left out here
as in transformers.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import deepseek, fields
from maxlm.huggingface.families.names import (
    NameTable,
    copy,
    linear,
    permute_rotary,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.huggingface.families.rope import (
    read_position_settings,
    write_position_settings,
)
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.sparse import SparseAttentionConfig

INDEXER = f"{deepseek.A}.indexer"
_LAYER_TYPE = "indexed_attention"
_MIXER = "mixer"


def _map_indexer(mixer: SparseAttentionConfig, *, is_interleaved: bool) -> NameTable:
    """Returns the entries of the indexer.

    Args:
        is_interleaved: whether RoPE turns neighbouring dimensions of its heads, as it
            does those of attention's; else i with i + R/2, as ours does.
    """
    latent = mixer.attention.latent
    assert latent is not None
    rotary_dim = latent.rotary_dim
    query = linear("attention.index_query.kernel")
    keys = {
        "wk.weight": linear("attention.index_key.kernel"),
        "k_norm.weight": copy("attention.index_key_norm.scale"),
        "k_norm.bias": copy("attention.index_key_norm.bias"),
    }
    if is_interleaved:
        query = permute_rotary(
            query, rotary_dim, each_head=True, first=True, head_dim=mixer.index_dim
        )
        keys = {
            name: permute_rotary(rule, rotary_dim, each_head=False, first=True)
            for name, rule in keys.items()
        }
    return {
        f"{INDEXER}.wq_b.weight": query,
        **{f"{INDEXER}.{name}": rule for name, rule in keys.items()},
        f"{INDEXER}.weights_proj.weight": linear("attention.index_weight.kernel"),
    }


def _map_layers(config: TransformerConfig, *, is_interleaved: bool) -> NameTable:
    mixer = fields.find_mixer(config, SparseAttentionConfig)
    latent = mixer.attention.latent
    assert latent is not None
    return {
        **deepseek.map_latent_layers(latent),
        **deepseek.SELECTION_BIAS,
        **_map_indexer(mixer, is_interleaved=is_interleaved),
    }


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    attention = settings[_MIXER]["attention"]
    deepseek.read_head_sizes(reader, attention, settings["norm"]["eps"])
    deepseek.read_dense_list(reader, settings, 3)
    rotary_dim = attention["latent"]["rotary_dim"]
    settings["positions"] = read_position_settings(reader, rotary_dim)
    num_layers = settings["num_layers"]
    fields.read_layer_types(reader, [_LAYER_TYPE] * num_layers, [_LAYER_TYPE])


def _write(config: TransformerConfig) -> dict[str, Any]:
    attention = fields.find_mixer(config, SparseAttentionConfig).attention
    latent = attention.latent
    assert latent is not None
    return {
        **write_position_settings(config.positions, latent.rotary_dim),
        **deepseek.write_head_sizes(attention),
        **deepseek.write_dense_list(config),
    }


def _read_glm(reader: ConfigReader, settings: dict[str, Any]) -> None:
    _read(reader, settings)
    # Later models choose in some layers, whose choice those behind them share.
    indexers = reader.names("indexer_types")
    letters = reader.text("index_topk_pattern", "")
    period = reader.size("index_topk_freq", 1)
    reader.ignore("index_skip_topk_offset")
    if {*indexers} - {"full"} or {*letters} - {"F"} or (not indexers and period > 1):
        message = "layers that share the choice of an earlier layer's indexer"
        fix = "convert a model with an indexer in each layer, such as GLM-5"
        raise MaxlmError(message, where=reader.where, fix=fix)
    reader.read_implemented("indexer_rope_interleave", True)


DEEPSEEK_V32 = replace(
    deepseek.DEEPSEEK_V3,
    name="deepseek_v32",
    hf_architecture="DeepseekV32ForCausalLM",
    fields={
        **deepseek.DEEPSEEK_V3.fields,
        **fields.map_in_mixer(
            _MIXER,
            SparseAttentionConfig,
            {
                "num_attention_heads": fields.map_size("attention.num_heads"),
                **deepseek.LATENT_ATTENTION,
                "q_lora_rank": fields.map_size("attention.latent.q_rank"),
                "index_n_heads": fields.map_size("index_heads", 64),
                "index_head_dim": fields.map_size("index_dim", 128),
                "index_topk": fields.map_size("top_k", 2048),
            },
        ),
        "mlp_bias": fields.require_value(False),
    },
    name_table=partial(_map_layers, is_interleaved=False),
    fixed_settings={
        **deepseek.SIGMOID_ROUTING,
        f"{_MIXER}.kind": "sparse_attention",
    },
    rope_kwargs=None,
    read_extra=_read,
    write_extra=_write,
    other_model_types=[],
)
GLM_MOE_DSA = replace(
    DEEPSEEK_V32,
    name="glm_moe_dsa",
    hf_architecture="GlmMoeDsaForCausalLM",
    fields={
        **DEEPSEEK_V32.fields,
        **deepseek.map_sigmoid_routing(groups=1, groups_per_token=1),
        "routed_scaling_factor": fields.map_number("moe.scale", 2.5),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        **fields.map_in_mixer(
            _MIXER,
            SparseAttentionConfig,
            {"index_n_heads": fields.map_size("index_heads", 32)},
        ),
    },
    name_table=partial(_map_layers, is_interleaved=True),
    read_extra=_read_glm,
)
