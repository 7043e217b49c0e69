"""Published models as they lie on the disk: a Hugging Face folder, or a GGUF file that
stands for one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from maxlm.config import MaxlmError
from maxlm.huggingface.files import StoredTensor
from maxlm.huggingface.gguf.library import SUFFIX
from maxlm.huggingface.gguf.reading import GgufModel, open_gguf_model
from maxlm.huggingface.quantized import list_model_tensors
from maxlm.runtime.json_files import read_json_object

_CONFIG = "config.json"


class ModelFiles(Protocol):
    """A published model, of which only headers are read before it is asked for more."""

    @property
    def path(self) -> Path:
        """The folder or file."""
        ...

    @property
    def config_path(self) -> Path:
        """What says how it computes, for messages."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """Values of config.json."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Tensors by their names in Hugging Face's files."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user."""
        ...

    @contextmanager
    def open_tokenizer_folder(self) -> Iterator[Path]:
        """Yields a folder with the tokenizer's files, where there are any. What is
        wrong with them is said of the model's own path."""
        ...


@dataclass(frozen=True)
class FolderFiles:
    """A Hugging Face folder."""

    path: Path
    notes: tuple[str, ...] = ()

    @property
    def config_path(self) -> Path:
        return self.path / _CONFIG

    @property
    def values(self) -> Mapping[str, Any]:
        return self._values

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    @cached_property
    def _values(self) -> Mapping[str, Any]:
        return read_json_object(self.config_path, "download it again")

    @cached_property
    def _tensors(self) -> Mapping[str, StoredTensor]:
        return list_model_tensors(self.path)

    @contextmanager
    def open_tokenizer_folder(self) -> Iterator[Path]:
        yield self.path


@dataclass(frozen=True)
class GgufFiles:
    """A GGUF file."""

    path: Path
    model: GgufModel = field(repr=False)

    @property
    def config_path(self) -> Path:
        return self.path

    @property
    def values(self) -> Mapping[str, Any]:
        return self.model.values

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self.model.tensors

    @property
    def notes(self) -> tuple[str, ...]:
        return self.model.notes

    @contextmanager
    def open_tokenizer_folder(self) -> Iterator[Path]:
        with TemporaryDirectory(prefix="maxlm-gguf-") as folder:
            if self.model.has_tokenizer:
                for name, data in self.model.make_tokenizer_files().items():
                    Path(folder, name).write_bytes(data)
            try:
                yield Path(folder)
            except MaxlmError as error:
                # Files of the folder are gone when the message is read.
                where = (error.where or "").replace(folder, str(self.path))
                raise MaxlmError(error.message, where=where, fix=error.fix) from error


def is_model_path(path: str | Path) -> bool:
    """Whether a published model is here: a folder with a config.json, or a GGUF
    file."""
    path = Path(path)
    return (path / _CONFIG).exists() or is_gguf_path(path)


def is_gguf_path(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    path = Path(path)
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def open_model_files(path: str | Path) -> ModelFiles:
    """Opens a published model. Raises MaxlmError: a GGUF file that cannot be read or is
    of an architecture that is not known. A folder's files are read when they are asked
    for."""
    path = Path(path)
    if is_gguf_path(path):
        return GgufFiles(path, open_gguf_model(path))
    return FolderFiles(path)
