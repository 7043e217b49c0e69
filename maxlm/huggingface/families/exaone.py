"""EXAONE 4 (LG AI Research 2025, arXiv 2507.11407): norms of what each branch adds, norms
of each query and key head; where some layers have windows, the others have no
positions."""

from typing import Any

from maxlm.huggingface.families import fields, llama, olmo
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.fields import GLOBAL, LOCAL
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.models.architectures.config import TransformerConfig


def _read(reader: ConfigReader, settings: dict[str, Any]) -> None:
    window = reader.size("sliding_window", 4096, nullable=True)
    num_layers = settings["num_layers"]
    if reader.has("layer_types"):
        reader.ignore("sliding_window_pattern")  # may be a word then, as "LLLG"
        kinds = [GLOBAL] * num_layers
    else:
        period = reader.size("sliding_window_pattern", 4)
        kinds = [
            GLOBAL if window is None or number % period == 0 else LOCAL
            for number in range(1, num_layers + 1)
        ]
    kind_settings: dict[str, dict[str, Any]] = {GLOBAL: {}}
    if window is not None:
        kind_settings = {
            LOCAL: {"window": window},
            GLOBAL: {"positions": {"kind": "none"}},
        }
    settings |= fields.read_layer_pattern(reader, kinds, kind_settings)


def _write(config: TransformerConfig) -> dict[str, Any]:
    kinds, window = fields.write_layer_types(config)
    return {"layer_types": kinds, "sliding_window": window}


EXAONE4 = ModelFamily(
    "exaone4",
    "Exaone4ForCausalLM",
    {
        **llama.COMMON,
        **llama.map_kv_heads(32),
        **llama.SWIGLU,
        "rms_norm_eps": fields.map_number("norm.eps", 1e-5),
    },
    {**llama.OUTER, **llama.ATTENTION, **olmo.OUTPUT_NORMS, **llama.MLP},
    {"placement": "output", "attention.qk_norm": True},
    rope_kwargs={},
    read_extra=_read,
    write_extra=_write,
)
