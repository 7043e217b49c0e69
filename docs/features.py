"""Tables of docs/families.md: what the models of each family are made of, as their
presets say, and model types that are not supported. ``generate.py`` writes them."""

import runpy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.huggingface.families import FAMILIES
from maxlm.huggingface.families.unsupported import KNOWN_UNSUPPORTED
from maxlm.models.architectures.config import TransformerConfig
from maxlm.models.architectures.pattern import LayerKind
from maxlm.models.architectures.runs import LayerStack
from maxlm.models.blocks import find_attention, get_kind
from maxlm.models.layers.attention_config import AttentionConfig
from maxlm.models.layers.mlp import Activation, ClampedSwiglu, MlpConfig, Xielu
from maxlm.models.layers.moe import MoeConfig
from maxlm.models.layers.norm import NormConfig
from maxlm.models.layers.positions import PositionsConfig
from maxlm.models.layers.sparse import SparseAttentionConfig

ROOT = Path(__file__).parents[1]
HEAD = (
    "| family | norms | attention | positions | feed-forward | other mixers | factors, "
    "caps and ties | cache |\n|---|---|---|---|---|---|---|---|\n"
)
_GATED = {"silu": "SwiGLU", "gelu": "GEGLU", "gelu_tanh": "GEGLU"}
_QK_NORMS = {
    "head": "q/k norms",
    "per_head": "q/k norms, weights of each head",
    "all_heads": "q/k norms over all heads",
    "weightless": "q/k norms without weights",
}


class LayerOfModel(NamedTuple):
    """One kind of layers of a model."""

    config: TransformerConfig
    stack: LayerStack
    kind: LayerKind

    @property
    def attention(self) -> AttentionConfig | None:
        return find_attention(self.stack.block.mixer)

    @property
    def positions(self) -> PositionsConfig:
        return self.config.get_positions(self.kind)


def _list_layers(config: TransformerConfig) -> Iterator[LayerOfModel]:
    """Yields the kinds of layers of all trunks."""
    for trunk in config.trunks:
        for stack in trunk.stacks:
            for kind in stack.kinds:
                yield LayerOfModel(config, stack, kind)


def _describe_norm(norm: NormConfig, placement: str) -> Iterator[str]:
    yield placement.replace("_", " ")
    name = "LayerNorm" if norm.kind == "layernorm" else "RMSNorm"
    if norm.weightless:
        name += " without weights"
    if norm.zero_centred:
        name += " × (1 + scale)"
    if norm.kind == "layernorm" and not norm.bias and not norm.weightless:
        name += " without offsets"
    yield name


def _describe_attention(layer: LayerOfModel) -> Iterator[str]:
    attention = layer.attention
    if attention is None:
        return
    if attention.latent is not None:
        yield "latent"
    elif attention.num_kv_heads == 1 < attention.num_heads:
        yield "one kv head"
    elif attention.num_kv_heads < attention.num_heads:
        yield "grouped"
    else:
        yield "multi-head"
    if layer.kind.window is not None:
        yield "windows"
    if attention.bias:
        yield "biases" if attention.has_out_bias else "q/k/v biases"
    if attention.qk_norm:
        yield _QK_NORMS[attention.qk_norm_form]
    if attention.qk_norm_after_rope:
        yield "q/k norms behind RoPE"
    words = {
        "value norms": attention.value_norm,
        "keys as values": attention.keys_as_values,
        "shared keys": attention.shares_keys,
        "chunks": attention.chunk is not None,
        "value heads of another size": attention.value_head_dim is not None,
        "temperature": attention.temperature is not None,
        "output gate": attention.output_gate is not None,
        "clipping": attention.clip is not None,
        "sinks": attention.sinks,
        "soft cap": attention.soft_cap is not None,
    }
    yield from (word for word, is_there in words.items() if is_there)


def _describe_positions(layer: LayerOfModel) -> Iterator[str]:
    positions = layer.positions
    attention = layer.attention
    if positions.kind != "rope":
        yield "none" if positions.kind == "none" else positions.kind
        return
    if attention is None:
        return
    is_part = positions.rotary_dim not in (None, attention.head_dim)
    yield "RoPE of a part" if is_part else "RoPE"
    if positions.scaling is not None:
        yield positions.scaling.kind.replace("_", " ")


def _describe_feed_forward(layer: LayerOfModel) -> Iterator[str]:
    ffn = layer.stack.block.ffn
    if isinstance(ffn, MlpConfig):
        yield _name_unit(ffn.activation, ffn.gated)
        if ffn.bias:
            yield "biases"
    elif isinstance(ffn, MoeConfig):
        yield f"experts by {ffn.score}"
        # Gated silu is what experts usually have.
        unit = _name_unit(ffn.activation, ffn.gated)
        if unit != _GATED["silu"]:
            yield unit
        words = {
            "biases": ffn.bias,
            "narrow experts": ffn.latent_dim is not None,
            "weighted inputs": ffn.weigh_inputs,
            "shared experts": ffn.shared_experts > 0,
            "gate on shared experts": ffn.shared_gate,
            "bias to select by": ffn.selection_bias,
            "groups": ffn.groups > 1,
        }
        yield from (word for word, is_there in words.items() if is_there)
    elif ffn is None:
        yield "none"


def _name_unit(activation: Activation | ClampedSwiglu | Xielu, gated: bool) -> str:
    """Names the hidden layer of a feed-forward."""
    if isinstance(activation, ClampedSwiglu):
        return "clamped SwiGLU"
    if isinstance(activation, Xielu):
        return "gated xIELU" if gated else "xIELU"
    name = activation.replace("relu2", "relu²").replace("_", " ")
    return _GATED.get(activation, f"gated {name}") if gated else name


def _describe_other_mixers(layer: LayerOfModel) -> Iterator[str]:
    mixer = layer.stack.block.mixer
    if mixer is None:
        yield "none in some layers"
    elif not isinstance(mixer, AttentionConfig):
        yield get_kind(mixer).replace("_", " ")


def _describe_cache(layer: LayerOfModel) -> Iterator[str]:
    mixer = layer.stack.block.mixer
    attention = layer.attention
    if attention is not None and attention.latent is not None:
        yield "latent vectors"
    elif attention is not None and not attention.shares_keys:
        yield "keys, values"
    if isinstance(mixer, SparseAttentionConfig):
        yield "keys of the indexer"
    elif mixer is not None and not isinstance(mixer, AttentionConfig):
        yield "states"


def _describe_factors(config: TransformerConfig) -> Iterator[str]:
    words = {
        "embeddings": config.embedding_scale != 1,
        "branches": config.residual_scale != 1,
        "logits": config.logit_scale != 1,
        "logit cap": config.logit_cap is not None,
        "norm of embeddings": config.embedding_norm,
        "head bias": config.head_bias,
        "tied": config.tie_embeddings,
    }
    yield from (word for word, is_there in words.items() if is_there)


def _join(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words)) or "–"


def make_features_table() -> str:
    """Returns a row for each built-in family: all that a preset of it has."""
    script: dict[str, Any] = runpy.run_path(
        str(ROOT / "benchmarks" / "parameter_counts.py")
    )
    presets: dict[str, list[TransformerConfig]] = {}
    for name in script["PUBLISHED"]:
        family = script["family"](name)
        presets.setdefault(family, []).append(script["preset"](name))
    rows = [
        _make_row(kind, presets[kind])
        for kind in FAMILIES.builtin_kinds()
        if kind in presets
    ]
    return HEAD + "".join(rows)


def _make_row(family: str, configs: list[TransformerConfig]) -> str:
    layers = [layer for config in configs for layer in _list_layers(config)]
    blocks = [layer.stack.block for layer in layers]
    is_encoder = all(config.transformer_type == "encoder" for config in configs)
    cells = [
        f"`{family}`",
        _join(
            word
            for block in blocks
            for word in _describe_norm(block.norm, block.placement)
        ),
        _join(word for layer in layers for word in _describe_attention(layer)),
        _join(word for layer in layers for word in _describe_positions(layer)),
        _join(word for layer in layers for word in _describe_feed_forward(layer)),
        _join(word for layer in layers for word in _describe_other_mixers(layer)),
        _join(word for config in configs for word in _describe_factors(config)),
        "–"
        if is_encoder
        else _join(word for layer in layers for word in _describe_cache(layer)),
    ]
    return f"| {' | '.join(cells)} |\n"


def make_unsupported_table() -> str:
    """Returns a row for model types that need the same."""
    by_need: dict[tuple[str, str], list[str]] = {}
    for model_type, entry in KNOWN_UNSUPPORTED.items():
        by_need.setdefault((entry.needs, entry.nearest), []).append(model_type)
    rows = ["| model type | needs | nearest family |\n|---|---|---|\n"]
    for (needs, nearest), model_types in by_need.items():
        named = ", ".join(f"`{name}`" for name in model_types)
        rows.append(f"| {named} | {needs} | `{nearest}` |\n")
    return "".join(rows)


def fill_families(page: str) -> str:
    """Returns families.md with both tables between their markers."""
    tables = {
        "features": make_features_table(),
        "unsupported": make_unsupported_table(),
    }
    for name, table in tables.items():
        start = f"<!-- {name} -->\n"
        end = f"<!-- /{name} -->\n"
        before, rest = page.split(start)
        _, after = rest.split(end)
        page = f"{before}{start}{table}{end}{after}"
    return page
