"""SmolLM3 (Bakouch et al. 2025): Llama's shape, without positions in every fourth
layer."""

from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import fields, llama
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    num_layers = settings["num_layers"]
    interval = reader.size("no_rope_layer_interval", 4)
    default = [int(number % interval != 0) for number in range(1, num_layers + 1)]
    turns = reader.flags("no_rope_layers") or default
    if len(turns) < num_layers:
        message = f"no_rope_layers does not name {num_layers} layers"
        fix = "take it from the published model"
        raise MaxlmError(message, where=reader.where, fix=fix)
    window = reader.size("sliding_window", None)
    if not reader.flag("use_sliding_window", False):
        window = None
    kinds = [GLOBAL if turn or window is None else LOCAL for turn in turns]
    allowed = (GLOBAL,) if window is None else (GLOBAL, LOCAL)
    kinds = fields.read_layer_types(reader, kinds[:num_layers], allowed)
    layers: list[dict[str, Any]] = []
    for kind, turn in zip(kinds, turns, strict=False):
        layer: dict[str, Any] = {}
        if kind == LOCAL:
            layer["window"] = window
        if not turn:
            layer["positions"] = {"kind": "none"}
        layers.append(layer)
    settings |= fields.make_pattern(layers)


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    layers = fields.list_layer_kinds(config)
    turns = [int(config.get_positions(kind).kind == "rope") for kind in layers]
    return {
        "layer_types": kinds,
        "no_rope_layers": turns,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # The library's padding lies outside small vocabularies.
        "pad_token_id": None,
    }


SMOLLM3 = ModelFamily(
    "smollm3",
    "SmolLM3ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(4),
        **llama.SWIGLU,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-6),
        "tie_word_embeddings": fields.map_flag("tie_embeddings", True),
        "attention_bias": fields.map_flag("attention.bias", False),
        "mlp_bias": fields.map_flag("mlp.bias", False),
    },
    llama.TABLE,
    rope_kwargs={"theta": 2_000_000.0},
    read_extra=_read,
    write_extra=_write,
    ignored_keys=["max_window_layers"],  # which the published code does not read
)
