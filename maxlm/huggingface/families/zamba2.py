"""Zamba2 (Zyphra 2024, arXiv 2411.15242): Mamba-2 layers, in some of which a block of
attention and an MLP comes first. Several such layers share one block's weights, each
with low-rank maps of its own beside them. What Zamba has of it too is here."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import bamba, fields, llama, mamba2
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.names import (
    NameTable,
    TensorRule,
    copy,
    linear,
    map_linear,
)
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.huggingface.families.rope import (
    read_position_settings,
    write_position_settings,
)
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.layers.mamba2 import Mamba2Config
from maxlm.models.shared_block import SharedBlockConfig

L = "model.layers.{layer}"
_NORM_EPS = 1e-5
"""Of the norm behind a state space, whatever the config says of others."""
_LONG_CONTEXT = 16_384
_KIND_OF_NAME = {
    "linear_attention": "mamba",
    "hybrid": "hybrid",
    # As before transformers 5.
    "mamba": "mamba",
}


def list_shared_layers(config: TransformerConfig) -> dict[str, list[int]]:
    """Lists the numbers of the layers that read each shared block, by its name."""
    layers: dict[str, list[int]] = {}
    for layer, kind_name in enumerate(fields.list_kind_names(config)):
        block = config.get_shared_block(config.kinds[kind_name])
        if block is not None:
            layers.setdefault(block, []).append(layer)
    return layers


def name_hybrid_layers(names: Sequence[str], num_blocks: int) -> list[str]:
    """Returns kinds of layers in which those named "hybrid" take turns with ``hybrid0``,
    ``hybrid1`` and so on."""
    kinds: list[str] = []
    num_hybrid = 0
    for name in names:
        if name != "hybrid":
            kinds.append(name)
            continue
        kinds.append(f"hybrid{num_hybrid % num_blocks}")
        num_hybrid += 1
    return kinds


def read_layer_names(
    reader: ConfigReader, num_layers: int, default: Sequence[str]
) -> list[str]:
    """Reads which layers are hybrid; ``default``: where the file does not say."""
    names = reader.names("layers_block_type") or reader.names("layer_types")
    names = names or list(default)
    for name in names:
        if name not in _KIND_OF_NAME:
            message = f"a layer of kind {name!r} is not implemented"
            fix = f"only {', '.join(_KIND_OF_NAME)} can be converted"
            raise MaxlmError(message, where=reader.where, fix=fix)
    if len(names) != num_layers:
        message = f"{len(names)} kinds of {num_layers} layers"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    return [_KIND_OF_NAME[name] for name in names]


def write_layer_names(config: TransformerConfig, num_blocks: int) -> list[str]:
    """Writes what :func:`read_layer_names` reads. Raises MaxlmError: blocks that do not
    take turns."""
    layers = list_shared_layers(config)
    block_of_layer = {
        layer: block for block, numbers in layers.items() for layer in numbers
    }
    order = list(layers)
    for number, layer in enumerate(sorted(block_of_layer)):
        if block_of_layer[layer] != order[number % num_blocks]:
            raise fields.refuse_pattern("shared blocks that do not take turns")
    return [
        "hybrid" if layer in block_of_layer else "linear_attention"
        for layer in range(config.num_layers)
    ]


def map_shared(
    config: TransformerConfig, name: str, rules: Mapping[str, TensorRule]
) -> NameTable:
    """Returns the entries of shared blocks, which files have under the first layer that
    reads them, and may have under the others again.

    Args:
        name: of the block's module within a layer.
        rules: by names within that module, of parameters within the block.
    """
    table: dict[str, TensorRule] = {}
    for block, layers in list_shared_layers(config).items():
        first, *others = (f"model.layers.{layer}.{name}" for layer in layers)
        for tensor, rule in rules.items():
            ours = tuple(
                f"shared_blocks.{block}.{parameter}" for parameter in rule.ours
            )
            aliases = tuple(f"{other}.{tensor}" for other in others)
            table[f"{first}.{tensor}"] = replace(rule, ours=ours, aliases=aliases)
    return table


SHARED_NORMS = {
    "input_layernorm.weight": copy("attention_norm.scale"),
    "pre_ff_layernorm.weight": copy("mlp_norm.scale"),
}
SHARED_ATTENTION = {
    f"self_attn.{theirs}.weight": linear(f"attention.{ours}.kernel")
    for theirs, ours in {**llama.PROJECTIONS, "o_proj": "out"}.items()
}
_SHARED = {
    **SHARED_NORMS,
    **SHARED_ATTENTION,
    "feed_forward.gate_up_proj.weight": linear("mlp.gate.kernel", "mlp.up.kernel"),
    "feed_forward.gate_up_proj.bias": linear("mlp.gate.bias", "mlp.up.bias"),
    **map_linear("feed_forward.down_proj", "mlp.down"),
}


def _map_low_rank(config: TransformerConfig) -> NameTable:
    """Returns the entries of each layer's low-rank maps: files have those of all layers
    of a block within the block, in lists by the hybrid layer's number."""
    table: dict[str, TensorRule] = {}
    blocks = list_shared_layers(config)
    hybrid_layers = sorted(layer for layers in blocks.values() for layer in layers)
    for layers in blocks.values():
        for layer in layers:
            number = hybrid_layers.index(layer)
            for list_name, ours in (
                ("feed_forward.gate_up_proj_adapter_list", ("a", "gate_b", "up_b")),
                ("self_attn.linear_q_adapter_list", ("query_a", "query_b")),
                ("self_attn.linear_k_adapter_list", ("key_a", "key_b")),
                ("self_attn.linear_v_adapter_list", ("value_a", "value_b")),
            ):
                module = (
                    "mlp_lora" if list_name.startswith("feed") else "attention_lora"
                )
                inner, *outer = (f"shared.{module}.{name}.kernel" for name in ours)
                for place, rule in enumerate((linear(inner), linear(*outer))):
                    first, *others = (
                        f"model.layers.{holder}.shared_transformer"
                        f".{list_name}.{number}.{place}.weight"
                        for holder in layers
                    )
                    table[first] = replace(rule, aliases=tuple(others), layer=layer)
    return table


def _make_table(config: TransformerConfig) -> NameTable:
    return {
        **bamba.OUTER,
        **map_shared(config, "shared_transformer", _SHARED),
        **_map_low_rank(config),
        f"{L}.input_layernorm.weight": copy("attention_norm.scale"),
        **mamba2.map_mamba2(f"{L}.mamba"),
        f"{L}.linear.weight": linear("shared.linear.kernel"),
        f"{L}.mamba_decoder.input_layernorm.weight": copy("shared.norm.scale"),
        **mamba2.map_mamba2(f"{L}.mamba_decoder.mamba", "shared.mamba2"),
    }


def _read_mixer(reader: ConfigReader, d_model: int, *, bias: bool) -> dict[str, Any]:
    num_heads = reader.size("n_mamba_heads", 8)
    inner = int(reader.number("mamba_expand", 2) * d_model)
    if inner % num_heads:
        message = f"n_mamba_heads={num_heads} heads do not make up {inner} channels"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    reader.read_implemented("mamba_headdim", None, inner // num_heads)
    return {
        "kind": "mamba2",
        "num_heads": num_heads,
        "head_dim": inner // num_heads,
        "state_size": reader.size("mamba_d_state", 64),
        "num_groups": reader.size("mamba_ngroups", 1),
        "conv_width": reader.size("mamba_d_conv", 4),
        "bias": bias,
        "norm_eps": _NORM_EPS,
        # The published code cuts time steps off below this, and reads no other limit.
        "min_step": reader.number("time_step_min", 0.001, least=0),
    }


def read_attention(
    reader: ConfigReader, d_model: int, *, num_heads: int
) -> dict[str, Any]:
    """Reads a shared block's attention, whose heads make up twice the model's width.
    ``num_heads``: where the file names none, as many kv heads too."""
    num_heads = reader.size("num_attention_heads", num_heads)
    head_dim = reader.size("attention_head_dim", 2 * d_model // num_heads)
    reader.read_implemented("attention_hidden_size", None, 2 * d_model)
    return {
        "num_heads": num_heads,
        "num_kv_heads": reader.size("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "scale": (head_dim / 2) ** -0.5,
    }


def check_block(config: TransformerConfig, block: SharedBlockConfig) -> None:
    """Raises MaxlmError: a shared block, or a model with it, that transformers has no
    settings for."""
    attention = block.attention
    fix = "keep maxlm's own files"
    if not config.tie_embeddings:
        message = "a shared_block beside a head of its own, which transformers lacks"
        raise MaxlmError(message, where="model.tie_embeddings", fix=fix)
    if attention.num_heads * attention.head_dim != 2 * config.d_model:
        message = "heads of a shared_block that do not make up twice d_model"
        raise MaxlmError(message, where="model.kinds", fix=fix)


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    d_model = settings["d_model"]
    num_layers = settings["num_layers"]
    bias = reader.flag("add_bias_linear", False)
    mixer = _read_mixer(reader, d_model, bias=bias)
    attention = read_attention(reader, d_model, num_heads=32)
    rank = reader.size("adapter_rank", 128)
    has_attention_rank = reader.flag("use_shared_attention_adapter", False)
    if has_attention_rank and attention["num_kv_heads"] != attention["num_heads"]:
        message = "use_shared_attention_adapter with fewer kv heads than heads"
        fix = "take config.json from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    if reader.flag("use_mem_rope", False):
        settings["positions"] = read_position_settings(reader, attention["head_dim"])
    else:
        settings["positions"] = {"kind": "none"}
        for key in ("rope_theta", "rope_scaling", "rope_parameters"):
            reader.ignore(key)
    if reader.flag("use_long_context", False):
        settings["max_seq_len"] = _LONG_CONTEXT
    block = {
        "kind": "shared_block",
        "attention": attention,
        "mlp": {
            "d_ff": reader.size("intermediate_size", 4 * d_model),
            "activation": fields.read_activation(reader, "hidden_act", "gelu"),
            "bias": bias,
        },
        "mixer": mixer,
        "mlp_rank": rank,
        "attention_rank": rank if has_attention_rank else None,
    }
    num_blocks = reader.size("num_mem_blocks", 1)
    names = read_layer_names(reader, num_layers, _list_published_layers())
    kinds = {"mamba": {"mixer": mixer, "ffn": "none"}}
    for number in range(min(num_blocks, num_layers)):
        named_block = {**block, "block": f"block{number}"}
        kinds[f"hybrid{number}"] = {"mixer": named_block, "ffn": "none"}
    settings["kinds"] = kinds
    fields.name_layers(settings, name_hybrid_layers(names, num_blocks))


def _list_published_layers() -> list[str]:
    """Lists the layers of Zamba2-2.7B, which files that name none have."""
    period = ["mamba"] * 5 + ["hybrid"]
    end = ["mamba"] * 4 + ["hybrid"] + ["mamba"] * 3 + ["hybrid"] + ["mamba"] * 2
    return ["mamba", *period * 7, *end]


def _write(config: TransformerConfig) -> dict[str, Any]:
    block = fields.find_mixer(config, SharedBlockConfig)
    mixer = block.mixer
    if not isinstance(mixer, Mamba2Config):
        message = "a shared_block before another mixer than mamba2"
        raise MaxlmError(message, fix="write it under another family")
    if block.mlp_rank is None or block.attention_rank not in (None, block.mlp_rank):
        message = "low-rank maps of unlike ranks"
        raise MaxlmError(message, fix="make mlp_rank and attention_rank equal")
    attention = block.attention
    check_block(config, block)
    num_blocks = len(config.shared_blocks)
    values: dict[str, Any] = {
        "layers_block_type": write_layer_names(config, num_blocks),
        "num_mem_blocks": num_blocks,
        "mamba_expand": bamba.divide_by_width(config, mixer.num_heads * mixer.head_dim),
        "n_mamba_heads": mixer.num_heads,
        "mamba_d_state": mixer.state_size,
        "mamba_ngroups": mixer.num_groups,
        "mamba_d_conv": mixer.conv_width,
        "time_step_min": mixer.min_step,
        "add_bias_linear": mixer.bias,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "intermediate_size": block.mlp.d_ff,
        "hidden_act": fields.to_hf_activation(block.mlp.activation),
        "adapter_rank": block.mlp_rank,
        "use_shared_attention_adapter": block.attention_rank is not None,
        "use_mem_rope": config.positions.kind == "rope",
    }
    if config.positions.kind == "rope":
        values |= write_position_settings(config.positions, attention.head_dim)
    return values


ZAMBA2 = ModelFamily(
    "zamba2",
    "Zamba2ForCausalLM",
    {
        "vocab_size": fields.map_size("vocab_size", 32_000),
        "hidden_size": fields.map_size("d_model", 2560),
        "num_hidden_layers": fields.map_layer_count("num_layers", 54),
        "max_position_embeddings": fields.map_size("max_seq_len", 4096),
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
        # Without it transformers shares no block's weights either.
        "tie_word_embeddings": fields.require_value(True, always_write=True),
    },
    _make_table,
    {"tie_embeddings": True},
    read_extra=_read,
    write_extra=_write,
    # Choices of programs and of initial weights, what the published code does not read,
    # and what follows from other values.
    ignored_keys=[
        *("chunk_size", "use_mamba_kernels", "use_mem_eff_path", "use_conv_bias"),
        *("time_step_max", "time_step_floor", "time_step_limit", "num_logits_to_keep"),
        *("hybrid_layer_ids", "kv_channels", "num_query_groups", "ffn_hidden_size"),
        *("layer_types", "head_dim", "mamba_expand"),
    ],
)
