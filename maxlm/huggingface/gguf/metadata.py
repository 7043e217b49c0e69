"""Keys of a GGUF file's metadata beside those of config.json, read in both
directions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.gguf.container import TensorPlace, Value

_OTHER = "convert the model again with a current llama.cpp, or use another file"
ConfigValues = Mapping[str, Any]
"""Values of config.json."""
Number = int | float | bool | str


@dataclass
class GgufMetadata:
    """The metadata of a model of one architecture, read so that what is passed over is
    known."""

    architecture: str
    values: Mapping[str, Value]
    tensors: Mapping[str, TensorPlace]
    where: str
    """The file, for messages."""
    _seen: set[str] = field(default_factory=set)

    def get(self, key: str) -> Value | None:
        """Returns the value of the architecture's own key ``key``; None: it has
        none."""
        full_key = f"{self.architecture}.{key}"
        self._seen.add(full_key)
        return self.values.get(full_key)

    def read_size(self, key: str, default: int | None = None) -> int | None:
        """Reads a whole number of at least 0. A list of one for each layer must be of
        equal ones. Raises MaxlmError as :meth:`require_size`."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, np.ndarray):
            distinct = np.unique(value)
            if len(distinct) != 1:
                message = f"{self.architecture}.{key} is not the same in all layers"
                fix = "use a model whose layers are alike"
                raise MaxlmError(message, where=self.where, fix=fix)
            value = distinct[0].item()
        if type(value) is not int or value < 0:
            raise self._wrong(key, value, "a whole number")
        return value

    def require_size(self, key: str) -> int:
        """Reads a whole number. Raises MaxlmError: it is missing, or none."""
        value = self.read_size(key)
        if value is None:
            raise self._lacks(key)
        return value

    def read_number(self, key: str, default: float | None = None) -> float | None:
        """Reads a number, as the shortest decimal that the file's fp32 is nearest to:
        1e-05, not 9.999999747378752e-06."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise self._wrong(key, value, "a number")
        return float(str(np.float32(value)))

    def require_number(self, key: str) -> float:
        """Reads a number. Raises MaxlmError: it is missing, or none."""
        value = self.read_number(key)
        if value is None:
            raise self._lacks(key)
        return value

    def read_text(self, key: str, default: str = "") -> str:
        """Reads a name."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, value, "a name")
        return value

    def read_flag(self, key: str, *, default: bool) -> bool:
        """Reads true or false."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def ignore(self, *keys: str) -> None:
        """Passes over keys that say nothing that tensors do not say."""
        self._seen |= {f"{self.architecture}.{key}" for key in keys}

    def list_unread(self) -> list[str]:
        """Lists the architecture's keys that nothing has read."""
        prefix = f"{self.architecture}."
        keys = (key for key in self.values if key.startswith(prefix))
        return sorted(key for key in keys if key not in self._seen)

    def _lacks(self, key: str) -> MaxlmError:
        message = f"its metadata lacks {self.architecture}.{key}"
        return MaxlmError(message, where=self.where, fix=_OTHER)

    def _wrong(self, key: str, value: object, kind: str) -> MaxlmError:
        message = f"{self.architecture}.{key}={str(value)[:80]} is not {kind}"
        return MaxlmError(message, where=self.where, fix=_OTHER)


@dataclass(frozen=True)
class MetadataKey:
    """A key of an architecture, and the key of config.json that says the same."""

    name: str
    theirs: str
    kind: Literal["size", "number", "flag"] = "size"
    is_required: bool = True
    """Whether a file without it is refused."""


def read_keys(metadata: GgufMetadata, keys: Iterable[MetadataKey]) -> dict[str, Any]:
    """Reads values of config.json. Raises MaxlmError: a required one is missing."""
    values: dict[str, Any] = {}
    for key in keys:
        value: Number | None
        if key.kind == "flag":
            value = metadata.read_flag(key.name, default=False)
        elif key.is_required and key.kind == "size":
            value = metadata.require_size(key.name)
        elif key.kind == "size":
            value = metadata.read_size(key.name)
        elif key.is_required:
            value = metadata.require_number(key.name)
        else:
            value = metadata.read_number(key.name)
        if value is not None:
            values[key.theirs] = value
    return values


def write_keys(values: ConfigValues, keys: Iterable[MetadataKey]) -> dict[str, Number]:
    """Writes what :func:`read_keys` reads, without the architecture's name."""
    metadata: dict[str, Number] = {}
    for key in keys:
        value = values.get(key.theirs)
        if value is not None:
            metadata[key.name] = float(value) if key.kind == "number" else value
    return metadata
