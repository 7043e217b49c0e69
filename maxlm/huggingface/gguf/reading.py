"""A GGUF file as the Hugging Face model that it stands for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.gguf.architectures import find_architecture
from maxlm.huggingface.gguf.architectures.architecture import Architecture
from maxlm.huggingface.gguf.container import GgufFile, TensorPlace, read_gguf
from maxlm.huggingface.gguf.metadata import ConfigValues, GgufMetadata
from maxlm.huggingface.gguf.names import NameRule, fill_name
from maxlm.huggingface.gguf.rope import FACTORS_LONG, FACTORS_SHORT, ROPE_FREQS
from maxlm.huggingface.gguf.tensors import GgufTensor, check_readable, place_tensor
from maxlm.huggingface.gguf.tokenizer_reading import (
    has_tokenizer,
    make_tokenizer_files,
    read_token_ids,
)
from maxlm.huggingface.quantized import QuantizedTensor

_SETTINGS_AS_TENSORS = (ROPE_FREQS, FACTORS_LONG, FACTORS_SHORT)


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file, understood."""

    file: GgufFile
    architecture: Architecture
    values: Mapping[str, Any]
    """What config.json would have."""
    tensors: Mapping[str, QuantizedTensor]
    """Tensors by their names in Hugging Face's files."""
    notes: tuple[str, ...]
    """Notes for the user."""

    @property
    def has_tokenizer(self) -> bool:
        return has_tokenizer(self.file.metadata)

    def make_tokenizer_files(self) -> dict[str, bytes]:
        """Returns the files of the tokenizer as a Hugging Face folder has them, by
        name. Raises MaxlmError: one that maxlm does not implement."""
        return make_tokenizer_files(self.file.metadata, str(self.file.path))


def open_gguf_model(path: str | Path) -> GgufModel:
    """Reads a file's header and understands it; tensors are read when they are asked
    for. Raises MaxlmError: not a GGUF file, a damaged one, an architecture or a setting
    that maxlm does not implement."""
    file = read_gguf(path)
    where = str(file.path)
    architecture = find_architecture(file.metadata.get("general.architecture"), where)
    metadata = GgufMetadata(architecture.name, file.metadata, file.tensors, where)
    values = architecture.read_values(metadata)
    tensors, left_out = _name_tensors(metadata, architecture, values)
    values |= read_token_ids(file.metadata)
    notes = [
        f"left out: {key}={metadata.values[key]}" for key in metadata.list_unread()
    ]
    notes += [f"left out: {name}" for name in left_out]
    return GgufModel(file, architecture, values, tensors, tuple(notes))


def _name_tensors(
    metadata: GgufMetadata, architecture: Architecture, values: ConfigValues
) -> tuple[dict[str, QuantizedTensor], list[str]]:
    """Returns the tensors by Hugging Face's names, and the names of those that have
    none."""
    tensors: dict[str, QuantizedTensor] = {}
    if architecture.join_tensors is not None:
        for tensor in architecture.join_tensors(metadata):
            tensors[tensor.name] = tensor
    left_out: list[str] = []
    checked_types: set[str] = set()
    for name, place in metadata.tensors.items():
        if name in _SETTINGS_AS_TENSORS or name.endswith(architecture.joined_names):
            continue
        is_used = False
        for rule in architecture.rules:
            match = rule.gguf_pattern.fullmatch(name)
            if match is None or not _is_chosen(rule, values):
                continue
            is_used = True
            if place.type_name not in checked_types:
                check_readable(place)
                checked_types.add(place.type_name)
            for tensor in _apply_rule(rule, match.groupdict(), place, values):
                tensors[tensor.name] = tensor
        if not is_used:
            left_out.append(name)
    return tensors, left_out


def _is_chosen(rule: NameRule, values: ConfigValues) -> bool:
    return rule.is_used is None or rule.is_used(values)


def _apply_rule(
    rule: NameRule, numbers: dict[str, str], place: TensorPlace, values: ConfigValues
) -> list[GgufTensor]:
    row_order = None
    if rule.make_row_order is not None:
        row_order = rule.make_row_order(values)
        num_rows = place.shape[0]
        if row_order is not None and num_rows % row_order.num_groups:
            message = f"{place.name} has {num_rows} rows, no whole number of heads"
            fix = "download it again"
            raise MaxlmError(message, where=str(place.path), fix=fix)
    if not rule.is_stacked:
        shape = (1, *place.shape) if rule.is_row else None
        name = fill_name(rule.theirs, numbers)
        return [
            place_tensor(
                place,
                name,
                shape=shape,
                row_order=row_order,
                added=rule.added,
                is_transposed=rule.is_transposed,
            )
        ]
    if len(place.shape) != 3:
        message = f"{place.name} is {list(place.shape)}, no stack of experts' matrices"
        raise MaxlmError(message, where=str(place.path), fix="download it again")
    return [
        place_tensor(
            place,
            fill_name(rule.theirs, {**numbers, "expert": str(expert)}),
            expert=expert,
        )
        for expert in range(place.shape[0])
    ]
