"""A tokenizer's folder: the library's model file, ``maxlm_tokenizer.json`` beside it,
and the files that an imported tokenizer came with."""

from collections.abc import Iterable
from contextlib import ExitStack
from os import PathLike
from pathlib import Path

from pydantic import ValidationError

from maxlm.config import Config, MaxlmError
from maxlm.config.errors import describe_first_error
from maxlm.data.tokenizer.config import Kind
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.runtime.json_files import check_regular_file

FORMAT = 1
METADATA = "maxlm_tokenizer.json"
JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
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


def has_tokenizer_files(folder: str | PathLike[str]) -> bool:
    """Whether ``folder`` has any file that ``Tokenizer.save`` would replace or
    remove."""
    names = (METADATA, JSON_FILE, SENTENCEPIECE_FILE, *CARRIED)
    return any((Path(folder) / name).exists() for name in names)


def read_metadata(folder: Path) -> TokenizerMetadata:
    """Returns what ``folder`` says of its tokenizer."""
    path = folder / METADATA
    if not path.exists() and (folder / JSON_FILE).exists():
        message = f"no {METADATA} here, but a {JSON_FILE}"
        fix = "make a tokenizer of it with `maxlm tokenizer import`"
        raise MaxlmError(message, where=str(folder), fix=fix)
    try:
        metadata = TokenizerMetadata.model_validate_json(read_file(path))
    except ValidationError as error:
        raise make_damaged_file_error(path, describe_first_error(error)) from error
    if metadata.format != FORMAT:
        message = f"tokenizer format {metadata.format} is not {FORMAT}"
        fix = "read it with the version of maxlm that wrote it"
        raise MaxlmError(message, where=str(path), fix=fix)
    if unknown := {*metadata.carried} - {*CARRIED}:
        raise make_damaged_file_error(path, f"carried: {min(unknown)}")
    return metadata


def write_files(
    contents: dict[str, bytes], folder: Path, stale: Iterable[str] = ()
) -> None:
    """Write files into a folder, all or, where the disk is full, none; remove the stale
    ones."""
    with convert_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            for name, data in contents.items():
                files.enter_context(replace_file(folder / name)).write_bytes(data)
        for name in stale:
            (folder / name).unlink(missing_ok=True)


def read_file(path: Path) -> bytes:
    """Returns a file's bytes."""
    check_regular_file(path, "copy the tokenizer's file again")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        fix = "name a folder that `maxlm tokenizer train` wrote"
        raise MaxlmError("no such file", where=str(path), fix=fix) from error


def make_damaged_file_error(path: Path, fault: str) -> MaxlmError:
    """Makes the error for a tokenizer's file that cannot be used."""
    message = f"damaged tokenizer file ({' '.join(fault.split())})"
    fix = "copy it again from a good tokenizer, or train it again"
    return MaxlmError(message, where=str(path), fix=fix)
