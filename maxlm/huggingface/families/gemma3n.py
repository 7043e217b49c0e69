"""Gemma 3n (Gemma Team 2025), the part for text: several residual streams (AltUp) with
a low-rank path (LAuReL), an embedding in each layer, last layers that read keys of
earlier ones, and first layers whose MLPs are sparse."""

from collections.abc import Sequence
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields, llama, rope
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.gemma import SANDWICH, TANH
from maxlm.huggingface.families.names import NameTable, copy, linear
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.altup import AltUpConfig
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.pattern import LayerKind

L = "model.layers.{layer}"
LAYER_INPUTS: NameTable = {
    "model.embed_tokens_per_layer.weight": copy("layer_inputs.embedding.table"),
    "model.per_layer_model_projection.weight": linear("layer_inputs.projection.kernel"),
    "model.per_layer_projection_norm.weight": copy("layer_inputs.norm.scale"),
    f"{L}.per_layer_input_gate.weight": linear("layer_input.gate.kernel"),
    f"{L}.per_layer_projection.weight": linear("layer_input.out.kernel"),
    f"{L}.post_per_layer_input_norm.weight": copy("layer_input.norm.scale"),
}
_SPARSE_LAYERS = 10
"""First layers that are sparse where the file does not say, of more."""


def _map_tensors(config: TransformerConfig) -> NameTable:
    """Returns the names of tensors; those of streams follow from their number."""
    table = {
        **SANDWICH,
        **LAYER_INPUTS,
        f"{L}.altup.correct_output_scale": copy("altup.output_scale"),
        f"{L}.altup.correction_coefs.weight": linear("altup.correction"),
        f"{L}.altup.prediction_coefs.weight": linear("altup.prediction"),
        f"{L}.altup.modality_router.weight": linear("altup.router"),
        f"{L}.altup.router_norm.weight": copy("altup.router_norm.scale"),
        f"{L}.laurel.linear_left.weight": linear("laurel.left.kernel"),
        f"{L}.laurel.linear_right.weight": linear("laurel.right.kernel"),
        f"{L}.laurel.post_laurel_norm.weight": copy("laurel.norm.scale"),
    }
    assert isinstance(config.block, AltUpConfig)
    for stream in range(1, config.block.num_streams):
        index = stream - 1
        table[f"model.altup_projections.{index}.weight"] = linear(
            f"streams.expansions.stream_{stream}.kernel"
        )
        table[f"model.altup_unembed_projections.{index}.weight"] = linear(
            f"streams.contractions.stream_{stream}.kernel"
        )
    return table


def _read_widths(reader: ConfigReader, num_layers: int) -> list[int]:
    """Reads the width of each layer's MLP: a number for all, or a list."""
    key = "intermediate_size"
    if not isinstance(reader.values.get(key), list):
        return [reader.size(key, 16_384)] * num_layers
    widths = reader.sizes(key)
    _check_length(reader, key, widths, num_layers)
    return widths


def _read_sparsities(reader: ConfigReader, num_layers: int) -> list[float]:
    """Reads the share of each layer's hidden layer that is shut off."""
    key = "activation_sparsity_pattern"
    reader.ignore(key)
    shares = reader.values.get(key)
    if shares is None:
        num_sparse = _SPARSE_LAYERS if num_layers > _SPARSE_LAYERS else 0
        return [0.95] * num_sparse + [0.0] * (num_layers - num_sparse)
    is_list = isinstance(shares, list) and all(
        type(share) in (int, float) and 0 <= share < 1 for share in shares
    )
    if not is_list:
        message = f"{key}={shares!r} is not a list of numbers from 0 to below 1"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    _check_length(reader, key, shares, num_layers)
    return [float(share) for share in shares]


def _check_length(
    reader: ConfigReader, key: str, values: Sequence[object], num_layers: int
) -> None:
    if len(values) != num_layers:
        message = f"{key} does not have a value for each of {num_layers} layers"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)


def read_sharing(
    reader: ConfigReader, layer_types: Sequence[str], default: int
) -> list[int | None]:
    """Reads the layer whose keys each layer reads: of the last ``num_kv_shared_layers``
    the last layer of the same type before them; None: it makes its own. Raises
    MaxlmError: there is no such layer."""
    num_layers = len(layer_types)
    key = "num_kv_shared_layers"
    num_shared = reader.size(key, default, least=0)
    first = num_layers - num_shared
    sources: list[int | None] = [None] * num_layers
    for layer in range(max(first, 0), num_layers):
        kind = layer_types[layer]
        before = [i for i in range(first) if layer_types[i] == kind]
        if not before:
            message = f"{key}={num_shared}, with no layer of {kind} before them"
            fix = "take it from the published model"
            raise MaxlmError(message, where=reader.where, fix=fix)
        sources[layer] = before[-1]
    return sources


def name_kinds(
    settings: dict[str, Any],
    layers: Sequence[dict[str, Any]],
    layer_types: Sequence[str],
    sources: Sequence[int | None],
) -> None:
    """Puts a pattern into a model's settings: a kind for each sort of layers, named by
    its type (``local``, ``global``), ``_sparse`` with such an MLP, ``_shared`` where it
    reads keys of another, and a number where there are several.

    Args:
        layers: settings of ``LayerKind`` of each layer.
        sources: the layer whose keys each reads.
    """
    kinds: dict[str, dict[str, Any]] = {}
    names: list[str] = []
    for layer, layer_type, source in zip(layers, layer_types, sources, strict=True):
        name = "local" if layer_type == LOCAL else "global"
        kind = dict(layer)
        if layer.get("mlp", {}).get("sparsity"):
            name += "_sparse"
        if source is not None:
            name += "_shared"
            kind["keys_of"] = names[source]
        stem = name
        number = 1
        while kinds.setdefault(name, kind) != kind:
            number += 1
            name = f"{stem}{number}"
        names.append(name)
    settings["kinds"] = kinds
    fields.name_layers(settings, names)


def write_sharing(config: TransformerConfig) -> int:
    """Writes the number of last layers that read keys of others. Raises MaxlmError:
    a pattern that the number cannot say."""
    kinds = fields.list_layer_kinds(config)
    num_shared = sum(kind.keys_of is not None for kind in kinds)
    if not num_shared:
        return 0
    names = fields.list_kind_names(config)
    num_own = len(kinds) - num_shared
    for kind in kinds[num_own:]:
        same = [i for i in range(num_own) if kinds[i].window == kind.window]
        if not same or kind.keys_of != names[same[-1]]:
            raise fields.refuse_pattern("other layers read keys than Gemma's")
    return num_shared


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    num_layers = settings["num_layers"]
    settings["embedding_scale"] = settings["d_model"] ** 0.5
    activation = fields.read_activation(reader, "hidden_activation", TANH)
    settings["layer_inputs"]["activation"] = activation
    settings["positions"], local_positions = rope.read_positions_by_kind(
        reader,
        settings["attention"]["head_dim"],
        theta=1_000_000.0,
        local_theta=reader.number("rope_local_base_freq", 10_000.0),
    )
    default_types = [
        LOCAL if number % 5 else GLOBAL for number in range(1, num_layers + 1)
    ]
    layer_types = fields.read_layer_types(reader, default_types, (LOCAL, GLOBAL))
    sources = read_sharing(reader, layer_types, 15)
    window = reader.size("sliding_window", 512)
    widths = _read_widths(reader, num_layers)
    sparsities = _read_sparsities(reader, num_layers)
    mlps = [
        {"d_ff": width, "activation": activation, "sparsity": sparsity}
        for width, sparsity in zip(widths, sparsities, strict=True)
    ]
    settings["mlp"] = mlps[-1]
    layers: list[dict[str, Any]] = []
    for layer_type, mlp in zip(layer_types, mlps, strict=True):
        layer: dict[str, Any] = {}
        if layer_type == LOCAL:
            layer |= {"window": window, "positions": local_positions}
        if mlp != mlps[-1]:
            layer["mlp"] = mlp
        layers.append(layer)
    name_kinds(settings, layers, layer_types, sources)


def _write(config: TransformerConfig) -> dict[str, Any]:
    layer_types, window = fields.write_layer_types(config)
    assert config.mlp is not None
    model_mlp = config.mlp

    def find_mlp(kind: LayerKind):
        return kind.mlp or model_mlp

    mlps = [find_mlp(kind) for kind in fields.list_layer_kinds(config)]
    values = {
        "hidden_activation": fields.to_hf_activation(model_mlp.activation),
        "intermediate_size": [mlp.d_ff for mlp in mlps],
        "activation_sparsity_pattern": [mlp.sparsity for mlp in mlps],
        "layer_types": layer_types,
        "num_kv_shared_layers": write_sharing(config),
        **rope.write_positions_by_kind(config),
    }
    if values["hidden_activation"] == "gelu_new":
        values["hidden_activation"] = TANH
    if window is not None:
        values["sliding_window"] = window
    return values


GEMMA_TEXT = {
    "head_dim": fields.map_size("attention.head_dim", 256),
    "attention_bias": fields.map_flag("attention.bias", False),
    "tie_word_embeddings": fields.require_value(True, ours="tie_embeddings"),
    "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
}
"""Settings that Gemma 3n and Gemma 4 write alike."""

GEMMA3N = ModelFamily(
    "gemma3n",
    "Gemma3nForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(2),
        **GEMMA_TEXT,
        "final_logit_softcapping": fields.map_number("logit_cap", 30.0, nullable=True),
        "altup_num_inputs": fields.map_size("block.num_streams", 4, least=2),
        "altup_active_idx": fields.map_size("block.active", 0, least=0),
        "altup_coef_clip": fields.map_number(
            "block.coefficient_clip", 120.0, nullable=True
        ),
        "altup_correct_scale": fields.require_value(True, ours="block.correct_scale"),
        "laurel_rank": fields.map_size("block.laurel_rank", 64),
        "hidden_size_per_layer_input": fields.map_size("layer_inputs.width", 256),
        "vocab_size_per_layer_input": fields.map_size(
            "layer_inputs.vocab_size", 262_144
        ),
        "use_bidirectional_attention": fields.require_value(None, False),
    },
    _map_tensors,
    {
        "placement": "sandwich",
        "attention.qk_norm": True,
        "attention.value_norm": True,
        "attention.scale": 1.0,
        "block.kind": "altup",
    },
    read_extra=_read,
    write_extra=_write,
    hf_model_type="gemma3n_text",
)
