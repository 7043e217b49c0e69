"""Which tensor gets which number format: llama.cpp's rules for its file types
(``llama_tensor_get_type`` of src/llama-quant.cpp), without an importance matrix.

A file type such as Q4_K_M is a format for most matrices and a better one for those that
lose most: values' and the FFN's last maps in some layers, output embeddings.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from maxlm.config import MaxlmError
from maxlm.huggingface.gguf.container import get_block_sizes
from maxlm.huggingface.gguf.library import import_gguf

_DEFAULT_TYPES = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "IQ4_NL": "IQ4_NL",
}
"""The format of most matrices, by file type."""
PLAIN_TYPES = ("F32", "F16", "BF16")
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""The format instead of one whose blocks rows are no whole number of."""
_NEVER_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ssm_conv1d",
    "shortconv.conv.weight",
)
"""Parts of names of matrices that stay in fp32: they are small, and matter."""
_POSITIONS = ("position_embd.weight", "token_types.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")

Shape = tuple[int, ...]
Category = Literal[
    "output", "embedding", "qkv", "value", "key", "attention_output", "ffn_down", ""
]


@dataclass(frozen=True)
class ModelShape:
    """What the rules ask of a model."""

    architecture: str
    """llama.cpp's name of it."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int
    """0: it has none."""

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // max(1, self.num_kv_heads)

    @property
    def is_70b(self) -> bool:
        """Whether it is a Llama or Qwen 2 of 70B, which llama.cpp knows by its
        layers."""
        if self.num_layers != 80:
            return False
        if self.architecture == "qwen2":
            return True
        return self.architecture == "llama" and self.num_heads != self.num_kv_heads


def parse_file_type(name: str) -> str:
    """Returns llama.cpp's name of a file type, ``Q4_K_M`` of "q4_k_m". Raises
    MaxlmError, with near names."""
    upper = name.upper().replace("-", "_")
    aliases = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
    upper = aliases.get(upper, upper)
    if upper in _DEFAULT_TYPES:
        return upper
    near = get_close_matches(upper, _DEFAULT_TYPES, n=1)
    listed = ", ".join(known.lower() for known in _DEFAULT_TYPES)
    fix = f"did you mean {near[0].lower()}?" if near else f"use one of {listed}"
    raise MaxlmError(f"--quantization {name}: no such type of GGUF files", fix=fix)


def get_file_type_id(file_type: str) -> int:
    """Returns the number of a file type in ``general.file_type``."""
    gguf = import_gguf()
    prefix = "ALL_" if file_type == "F32" else "MOSTLY_"
    return int(gguf.LlamaFileType[prefix + file_type])


def choose_tensor_types(
    file_type: str, shapes: Mapping[str, Shape], model: ModelShape
) -> dict[str, str]:
    """Returns the number format of each tensor, by its name in GGUF files.

    Args:
        file_type: a name that :func:`parse_file_type` returns.
        shapes: of all tensors, outputs before inputs.
    """
    default_type = _DEFAULT_TYPES[file_type]
    chooser = _TypeChooser(file_type, default_type, shapes, model)
    types: dict[str, str] = {}
    # Rules count the tensors that came before, in llama.cpp's order.
    for name in sorted(shapes, key=_get_order):
        shape = shapes[name]
        if not _can_be_quantized(name, shape):
            types[name] = "F32"
        elif default_type in PLAIN_TYPES:
            types[name] = default_type
        else:
            types[name] = _fall_back(chooser.choose(name, shape), shape[-1])
    return types


def _get_order(name: str) -> tuple[int, str]:
    match = _LAYER.match(name)
    return (int(match[1]) if match else -1, name)


def _can_be_quantized(name: str, shape: Shape) -> bool:
    # A matrix of one row is a vector to ggml.
    num_dims = len(shape)
    while num_dims > 1 and shape[len(shape) - num_dims] == 1:
        num_dims -= 1
    if num_dims < 2 or not name.endswith("weight") or name in _POSITIONS:
        return False
    return not any(part in name for part in _NEVER_QUANTIZED)


def _fall_back(type_name: str, num_columns: int) -> str:
    values_per_block, _ = get_block_sizes(type_name)
    if num_columns % values_per_block == 0:
        return type_name
    other = _FALLBACKS.get(type_name, "F16")
    values_per_block, _ = get_block_sizes(other)
    return other if num_columns % values_per_block == 0 else "F16"


def _find_category(name: str) -> Category:
    if name == "output.weight":
        return "output"
    if name == "token_embd.weight":
        return "embedding"
    by_part: dict[str, Category] = {
        "attn_qkv.weight": "qkv",
        "attn_kv_b.weight": "value",
        "attn_v.weight": "value",
        "attn_k.weight": "key",
        "attn_output.weight": "attention_output",
        "ffn_down": "ffn_down",
    }
    for part, category in by_part.items():
        if part in name:
            return category
    return ""


def _uses_more_bits(index: int, count: int) -> bool:
    """Whether a layer is one of the first or last eighth, or every third between."""
    first = count // 8
    return index < first or index >= 7 * count // 8 or (index - first) % 3 == 2


class _TypeChooser:
    """The rules, in the order of the tensors."""

    def __init__(
        self,
        file_type: str,
        default_type: str,
        names: Iterable[str],
        model: ModelShape,
    ):
        self._file_type = file_type
        self._default_type = default_type
        self._model = model
        categories = [_find_category(name) for name in names]
        self._is_tied = "output" not in categories
        self._num_values = sum(kind in ("value", "qkv") for kind in categories)
        self._values_seen = 0
        self._downs_seen = 0

    def choose(self, name: str, shape: Shape) -> str:
        """Returns the format of a matrix, whose rows may be no whole number of its
        blocks."""
        category = _find_category(name)
        if category == "output" or (category == "embedding" and self._is_tied):
            return self._choose_output(shape[-1])
        if category in ("value", "qkv"):
            return self._choose_value()
        if category == "key" and self._model.num_experts == 8:
            return "Q8_0"
        if category == "ffn_down":
            return self._choose_down(name)
        if category == "attention_output":
            return self._choose_attention_output()
        return self._default_type

    def _choose_output(self, num_columns: int) -> str:
        values_per_block, _ = get_block_sizes(self._default_type)
        is_falcon = self._model.architecture == "falcon"
        if is_falcon or num_columns % values_per_block:
            return "Q8_0"
        return "Q8_0" if self._default_type == "Q8_0" else "Q6_K"

    def _choose_value(self) -> str:
        index = self._values_seen
        self._values_seen += 1
        has_few_kv_heads = self._model.queries_per_kv_head >= 4
        gets_more = _uses_more_bits(index, self._num_values)
        chosen = self._default_type
        match self._file_type:
            case "Q2_K":
                chosen = "Q4_K" if has_few_kv_heads else "Q3_K"
            case "Q3_K_M":
                chosen = "Q5_K" if index < 2 else "Q4_K"
            case "Q3_K_L":
                chosen = "Q5_K"
            case "IQ4_NL" if has_few_kv_heads:
                chosen = "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if gets_more:
                chosen = "Q6_K"
            case "Q4_K_S" if index < 4:
                chosen = "Q5_K"
        if self._model.is_70b and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        # Of eight experts the rest is so large that this does not count.
        return "Q8_0" if self._model.num_experts == 8 else chosen

    def _choose_down(self, name: str) -> str:
        count = self._model.num_layers
        index = self._downs_seen
        self._downs_seen += 1
        if self._model.num_experts > 1:
            # Several such tensors a layer.
            index, _ = _get_order(name)
        is_falcon = self._model.architecture == "falcon"
        gets_more = _uses_more_bits(index, count)
        match self._file_type:
            case "Q2_K":
                return "Q3_K"
            case "Q3_K_M":
                if index < count // 16:
                    return "Q5_K"
                return "Q4_K" if not is_falcon or gets_more else "Q3_K"
            case "Q3_K_L":
                return "Q4_K" if is_falcon else "Q5_K"
            case "Q4_K_M" if is_falcon:
                if index < count // 16:
                    return "Q6_K"
                return "Q5_K" if gets_more else "Q4_K"
            case "Q4_K_M" | "Q5_K_M" if gets_more:
                return "Q6_K"
            case "IQ4_NL" if index < count // 8:
                return "Q5_K"
            case "Q4_K_S" if index < count // 8 and not is_falcon:
                return "Q5_K"
        return self._default_type

    def _choose_attention_output(self) -> str:
        if self._model.architecture == "falcon":
            return "Q4_K" if self._file_type == "Q3_K_L" else self._default_type
        if self._model.num_experts == 8:
            small = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M")
            return "Q5_K" if self._file_type in small else self._default_type
        by_file_type = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
        return by_file_type.get(self._file_type, self._default_type)
