"""A tokenizer's folder: the library's model file, ``maxlm_tokenizer.json`` beside it, and the
files that an imported tokenizer came with."""

import os
import shutil
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from maxlm.config import Config, MaxlmError
from maxlm.data.tokenizer.config import Kind

FORMAT = 1
METADATA = "maxlm_tokenizer.json"
JSON_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
CARRIED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""The other files of a Hugging Face tokenizer; they are kept unchanged for export."""


class TokenizerMetadata(Config):
    """The content of ``maxlm_tokenizer.json``."""

    format: int
    kind: Kind
    vocab_size: int
    bos: str
    eos: str
    pad: str | None
    special_tokens: dict[str, int]
    fingerprint: str
    opens: bool = True
    """Whether documents open with bos."""
    stops: tuple[int, ...] = ()
    """Ids that end a continuation, as an imported checkpoint names them."""
    carried: tuple[str, ...] = ()
    """Names of further files, from ``CARRIED``."""


def has_tokenizer(folder: str | PathLike[str]) -> bool:
    """Whether ``folder`` has any file that ``Tokenizer.save`` would replace or remove."""
    names = (METADATA, JSON_FILE, SENTENCEPIECE_FILE, *CARRIED)
    return any((Path(folder) / name).exists() for name in names)


def write_files(contents: dict[str, bytes], folder: Path, stale: Iterable[str] = ()) -> None:
    """Write files into a folder, each whole or not at all, and remove the stale ones. A new folder
    appears whole.

    Raises:
        MaxlmError: the folder cannot be written.
    """
    within = folder if folder.exists() else folder.parent
    part = within / f".tokenizer.part.{os.getpid()}"
    # A killed process of this id may have left it: in containers ids repeat.
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, data in contents.items():
            (part / name).write_bytes(data)
        if within is not folder:
            part.rename(folder)
        else:
            for name in contents:
                (part / name).replace(folder / name)
            for name in stale:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise MaxlmError(
            f"cannot write the tokenizer: {error.strerror}",
            where=str(folder),
            fix="choose a folder you may write to",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_file(path: Path) -> bytes:
    """Returns a file's bytes.

    Raises:
        MaxlmError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        fix = "name a folder that `maxlm tokenizer train` wrote"
        raise MaxlmError("no such file", where=str(path), fix=fix) from error
    except OSError as error:
        what = f"cannot read it: {error.strerror}"
        raise MaxlmError(what, where=str(path), fix="make it readable") from error


def describe_damaged_file(path: Path, fault: str) -> MaxlmError:
    """The error for a tokenizer's file that cannot be used."""
    return MaxlmError(
        f"damaged tokenizer file ({' '.join(fault.split())})",
        where=str(path),
        fix="copy it again from a good tokenizer, or train it again",
    )
