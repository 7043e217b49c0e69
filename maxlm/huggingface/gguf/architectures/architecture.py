"""An architecture of llama.cpp's, and the Hugging Face models that it stands for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import nextafter
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.families.fields import ACTIVATIONS
from maxlm.huggingface.gguf.metadata import (
    ConfigValues,
    GgufMetadata,
    MetadataKey,
    Number,
    read_keys,
    write_keys,
)
from maxlm.huggingface.gguf.names import NameRules
from maxlm.huggingface.gguf.rope import make_rope_tensors, read_rope, write_rope
from maxlm.huggingface.quantized import QuantizedTensor

TOKEN_EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"


@dataclass(frozen=True)
class Architecture:
    """An architecture by its name in ``general.architecture``. Pure: no file is read or
    written."""

    name: str
    hf_architecture: str
    """The class of config.json's ``architectures``."""
    model_type: str
    keys: tuple[MetadataKey, ...]
    rules: NameRules
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values of config.json that all of llama.cpp's models of this kind have: GGUF has
    no word for others."""
    is_rotary: bool = True
    partial_key: str | None = None
    """Key of config.json with the share of dimensions that turn; None: all do."""
    theta_key: str = "rope_theta"
    tie_key: str | None = "tie_word_embeddings"
    """Key of config.json that says that there is no head of its own; None: there never
    is one."""
    width_key: str = "hidden_size"
    heads_key: str = "num_attention_heads"
    read_extra: Callable[[GgufMetadata, dict[str, Any]], None] = (
        lambda metadata, values: None
    )
    """Reads into values of config.json what the fields above cannot say."""
    write_extra: Callable[[ConfigValues, dict[str, Number]], list[str]] = (
        lambda values, metadata: []
    )
    """Writes what ``read_extra`` reads, and returns notes for the user; or raises
    MaxlmError where llama.cpp computes something else."""
    get_rope: Callable[[ConfigValues], dict[str, Any]] | None = None
    """Returns values of config.json with ``rope_theta`` and ``rope_scaling`` of what
    the keys are of; None: ``theta_key`` and ``rope_scaling`` there."""
    rotary_key: str | None = None
    """Key of config.json with the number of dimensions that turn; None: it follows from
    a head's."""
    join_tensors: Callable[[GgufMetadata], list[QuantizedTensor]] | None = None
    """Returns tensors that a file has in parts."""
    joined_names: tuple[str, ...] = ()
    """Ends of the names of these parts."""
    other_hf_architectures: tuple[str, ...] = ()
    """Further classes that are written as this."""

    def read_values(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Returns the values of config.json. Raises MaxlmError: a key that is missing,
        or a value that maxlm does not implement."""
        table = metadata.tensors.get(TOKEN_EMBEDDING)
        if table is None or len(table.shape) != 2:
            message = f"it has no matrix {TOKEN_EMBEDDING}"
            fix = "use the file of a language model"
            raise MaxlmError(message, where=metadata.where, fix=fix)
        values: dict[str, Any] = {
            "architectures": [self.hf_architecture],
            "model_type": self.model_type,
            "vocab_size": table.shape[0],
            **self.fixed,
            **read_keys(metadata, self.keys),
        }
        if self.tie_key is not None:
            values[self.tie_key] = OUTPUT not in metadata.tensors
        head_dim = values.get("head_dim")
        if head_dim is None:
            head_dim = self._get_default_head_dim(values)
        if self.is_rotary:
            rotary_size = metadata.read_size("rope.dimension_count", head_dim)
            assert rotary_size is not None
            if self.partial_key is not None:
                share = rotary_size / head_dim
                # Who reads it cuts the product off, which rounding can leave just below
                # a whole number.
                exact = int(head_dim * share) == rotary_size
                values[self.partial_key] = share if exact else nextafter(share, 1)
            rope = read_rope(metadata, rotary_size)
            values[self.theta_key] = rope.pop("rope_theta")
            values |= rope
        metadata.ignore("vocab_size", "rope.dimension_count", "attention.value_length")
        self.read_extra(metadata, values)
        return values

    def write_metadata(
        self, values: ConfigValues
    ) -> tuple[dict[str, Number], list[str]]:
        """Returns the metadata of a model, without the architecture's name, and notes
        for the user. Raises MaxlmError: llama.cpp computes something else."""
        for key, value in self.fixed.items():
            stored = values.get(key, value)
            if _name_activation(stored) != _name_activation(value):
                raise self.refuse(key, stored)
        metadata: dict[str, Number] = {
            "vocab_size": values["vocab_size"],
            **write_keys(values, self.keys),
        }
        key_length = metadata.get("attention.key_length")
        if key_length is not None:
            metadata["attention.value_length"] = key_length
        if self.is_rotary:
            metadata |= write_rope(self._get_rope(values), self._get_rotary(values))
        notes = self.write_extra(values, metadata)
        return metadata, notes

    def make_extra_tensors(self, values: ConfigValues) -> dict[str, np.ndarray]:
        """Returns tensors that Hugging Face's files do not have, fp32, by name."""
        if not self.is_rotary:
            return {}
        return make_rope_tensors(self._get_rope(values), self._get_rotary(values))

    def refuse(self, key: str, value: object) -> MaxlmError:
        """Returns the error of a setting that llama.cpp does not have."""
        message = f"GGUF's architecture {self.name} has no word for {key}={value!r}"
        fix = "write the model for transformers, or change it"
        return MaxlmError(message, where="config.json", fix=fix)

    def _get_rope(self, values: ConfigValues) -> dict[str, Any]:
        if self.get_rope is not None:
            return self.get_rope(values)
        return {**values, "rope_theta": values[self.theta_key]}

    def _get_rotary(self, values: ConfigValues) -> int:
        if self.rotary_key is not None:
            return values[self.rotary_key]
        head_dim = values.get("head_dim") or self._get_default_head_dim(values)
        share = 1.0
        if self.partial_key is not None:
            share = values.get(self.partial_key, 1.0)
        return int(head_dim * share)

    def _get_default_head_dim(self, values: ConfigValues) -> int:
        return values[self.width_key] // max(1, values[self.heads_key])


def _name_activation(value: object) -> object:
    """Returns one name for an activation that config.json has several of; other values
    as they are."""
    return ACTIVATIONS.get(value, value) if isinstance(value, str) else value


def map_sizes(
    num_layers: str = "num_hidden_layers",
    d_model: str = "hidden_size",
    max_seq_len: str = "max_position_embeddings",
    num_heads: str = "num_attention_heads",
) -> tuple[MetadataKey, ...]:
    """Returns the keys that every architecture has, by config.json's names."""
    return (
        MetadataKey("block_count", num_layers),
        MetadataKey("context_length", max_seq_len),
        MetadataKey("embedding_length", d_model),
        MetadataKey("attention.head_count", num_heads),
    )


KV_HEADS = MetadataKey(
    "attention.head_count_kv", "num_key_value_heads", is_required=False
)
HEAD_DIM = MetadataKey("attention.key_length", "head_dim", is_required=False)
FFN = MetadataKey("feed_forward_length", "intermediate_size")
EXPERTS_USED = MetadataKey("expert_used_count", "num_experts_per_tok")
EXPERT_FFN = MetadataKey("expert_feed_forward_length", "moe_intermediate_size")
_RMS_EPS = "attention.layer_norm_rms_epsilon"
_LAYER_EPS = "attention.layer_norm_epsilon"
RMS_NORM = MetadataKey(_RMS_EPS, "rms_norm_eps", "number")


def map_layer_norm(theirs: str) -> MetadataKey:
    """Returns the key of a LayerNorm's epsilon."""
    return MetadataKey(_LAYER_EPS, theirs, "number")
