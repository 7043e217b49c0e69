"""A run's checkpoint as a GGUF file, a tensor in memory at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.huggingface.checkpoint import CheckpointReader
from maxlm.huggingface.convert import iterate_exported_tensors
from maxlm.huggingface.families.names import TensorEntry
from maxlm.huggingface.gguf.architectures import find_hf_architecture
from maxlm.huggingface.gguf.architectures.architecture import Architecture
from maxlm.huggingface.gguf.container import Value
from maxlm.huggingface.gguf.file_types import (
    ModelShape,
    choose_tensor_types,
    get_file_type_id,
)
from maxlm.huggingface.gguf.metadata import ConfigValues, Number
from maxlm.huggingface.gguf.names import NameRule, fill_name
from maxlm.huggingface.gguf.tokenizer_reading import KEY
from maxlm.huggingface.gguf.tokenizer_writing import make_tokenizer_metadata
from maxlm.huggingface.gguf.writer import GgufFileWriter, TensorSpec
from maxlm.runtime.progress import Progress, ignore_progress

_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class _Target:
    """Where a tensor of Hugging Face's goes."""

    name: str
    rule: NameRule
    expert: int | None


def write_gguf_model(
    path: Path,
    checkpoint: CheckpointReader,
    entries: Sequence[TensorEntry],
    values: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    file_type: str,
    *,
    name: str,
    progress: Progress = ignore_progress,
) -> list[str]:
    """Writes a model; returns notes for the user. Raises MaxlmError before anything is
    written: llama.cpp has no such model, or no such tokenizer.

    Args:
        entries: of all tensors, by Hugging Face's names.
        values: of config.json.
        file_type: which number formats tensors get, as
            :func:`~maxlm.huggingface.gguf.file_types.parse_file_type` returns it.
        name: the model's, for people.
    """
    architecture = find_hf_architecture(values["architectures"][0])
    own_metadata, notes = architecture.write_metadata(values)
    targets = {
        entry.theirs: _find_target(entry.theirs, architecture, values)
        for entry in entries
    }
    shapes = _list_shapes(entries, targets)
    extra_tensors = architecture.make_extra_tensors(values)
    types = choose_tensor_types(
        file_type, shapes, _describe(architecture, own_metadata)
    )
    if tokenizer is None:
        tokenizer_metadata: dict[str, Value] = {f"{KEY}.model": "none"}
        notes.append("no tokenizer: the run has none")
    else:
        tokenizer_metadata, tokenizer_notes = make_tokenizer_metadata(
            tokenizer, values["vocab_size"]
        )
        notes += tokenizer_notes
    metadata: dict[str, Value] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": get_file_type_id(file_type),
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    for key, value in own_metadata.items():
        metadata[f"{architecture.name}.{key}"] = value
    specs = {name: TensorSpec("F32", x.shape) for name, x in extra_tensors.items()}
    for tensor_name, shape in shapes.items():
        specs[tensor_name] = TensorSpec(types[tensor_name], shape)
    writer = GgufFileWriter(
        path, architecture.name, metadata | tokenizer_metadata, specs
    )
    for tensor_name, tensor in extra_tensors.items():
        writer.write(tensor_name, tensor)
    bytes_done = 0
    total_bytes = sum(4 * entry_size(entry) for entry in entries)
    for entry, tensor in iterate_exported_tensors(checkpoint, entries, path.parent):
        target = targets[entry.theirs]
        converted = _convert(tensor, target.rule, values)
        writer.write(target.name, converted, target.expert)
        bytes_done += 4 * entry_size(entry)
        progress("converting", bytes_done, total_bytes)
        del tensor, converted  # before the next is read
    return notes


def entry_size(entry: TensorEntry) -> int:
    """Returns the values of a tensor."""
    return int(np.prod(entry.shape, dtype=np.int64))


def _find_target(
    name: str, architecture: Architecture, values: ConfigValues
) -> _Target:
    for rule in architecture.rules:
        match = rule.their_pattern.fullmatch(name)
        if match is None or (rule.is_used is not None and not rule.is_used(values)):
            continue
        numbers = match.groupdict()
        expert = int(numbers["expert"]) if rule.is_stacked else None
        return _Target(fill_name(rule.gguf, numbers), rule, expert)
    message = f"llama.cpp's {architecture.name} has no tensor for {name}"
    raise MaxlmError(message, fix="write the model for transformers")


def _list_shapes(
    entries: Sequence[TensorEntry], targets: Mapping[str, _Target]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors of the file, stacks of experts whole."""
    shapes: dict[str, tuple[int, ...]] = {}
    num_experts: dict[str, int] = {}
    for entry in entries:
        target = targets[entry.theirs]
        shape = tuple(entry.shape)
        if target.rule.is_transposed:
            shape = shape[::-1]
        if target.rule.is_row:
            shape = shape[1:]
        if target.expert is not None:
            count = max(num_experts.get(target.name, 0), target.expert + 1)
            num_experts[target.name] = count
            shape = (count, *shape)
        shapes[target.name] = shape
    return shapes


def _convert(tensor: np.ndarray, rule: NameRule, values: ConfigValues) -> np.ndarray:
    """Returns a tensor of Hugging Face's as the file has it, fp32."""
    converted = np.asarray(tensor, np.float32)
    if rule.is_transposed:
        converted = converted.T
    if rule.is_row:
        converted = converted[0]
    if rule.added:
        converted = converted + np.float32(rule.added)
    if rule.make_row_order is not None:
        row_order = rule.make_row_order(values)
        if row_order is not None:
            converted = converted[row_order.list_rows(len(converted))]
    return converted


def _describe(architecture: Architecture, metadata: Mapping[str, Number]) -> ModelShape:
    num_heads = int(metadata["attention.head_count"])
    return ModelShape(
        architecture.name,
        num_layers=int(metadata["block_count"]),
        num_heads=num_heads,
        num_kv_heads=int(metadata.get("attention.head_count_kv", num_heads)),
        num_experts=int(metadata.get("expert_count", 0)),
    )
