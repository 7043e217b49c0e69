"""A tokenizer's folder: the library's model file, ``maxlm_tokenizer.json`` beside it, and what
files an imported tokenizer brought along."""

import os
import shutil
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from pydantic import ValidationError

from maxlm.config import Config, MaxlmError
from maxlm.data.tokenizer.bpe import ByteLevelBPE
from maxlm.data.tokenizer.codec import Codec, CodecTokenizer, SpecialTokens
from maxlm.data.tokenizer.config import Kind
from maxlm.data.tokenizer.huggingface import HuggingFaceModel
from maxlm.data.tokenizer.interface import Tokenizer
from maxlm.data.tokenizer.sentencepiece_model import SentencePieceModel

METADATA = "maxlm_tokenizer.json"
_FORMAT = 1
_MODEL_FILES = (ByteLevelBPE.file_name, SentencePieceModel.file_name)
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
"""What else belongs to a Hugging Face tokenizer: kept as it is, for the way back."""


class TokenizerMetadata(Config):
    """What ``maxlm_tokenizer.json`` holds."""

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


def load_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """The tokenizer saved in ``folder``.

    Raises:
        MaxlmError: the folder or one of its files is missing, unreadable or damaged, or the files
            do not belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MaxlmError(
            "no such folder" if not folder.exists() else "not a folder",
            where=str(folder),
            fix="name a folder that `maxlm tokenizer train` wrote",
        )
    path = folder / METADATA
    if not path.exists() and (folder / HuggingFaceModel.file_name).exists():
        raise MaxlmError(
            f"no {METADATA} here, but a {HuggingFaceModel.file_name}",
            where=str(folder),
            fix="make a tokenizer of it with `maxlm tokenizer import`",
        )
    try:
        metadata = TokenizerMetadata.model_validate_json(read_file(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        fault = f"{field}: {first['msg']}" if field else first["msg"]
        raise _damaged(path, fault) from error
    if metadata.format != _FORMAT:
        raise MaxlmError(
            f"tokenizer format {metadata.format} is not {_FORMAT}",
            where=str(path),
            fix="read it with the version of maxlm that wrote it",
        )
    if unknown := {*metadata.carried} - {*CARRIED}:
        raise _damaged(path, f"carried: {min(unknown)}")
    codec = open_codec(metadata.kind, folder, metadata.special_tokens)
    special = SpecialTokens(
        metadata.special_tokens, bos=metadata.bos, eos=metadata.eos, pad=metadata.pad
    )
    carried = {name: read_file(folder / name) for name in metadata.carried}
    if strange := [i for i in metadata.stops if not 0 <= i < metadata.vocab_size]:
        raise _damaged(path, f"stops: {strange[0]}")
    more = {"opens": metadata.opens, "stops": metadata.stops, "carried": carried}
    tokenizer = CodecTokenizer(metadata.kind, codec, special, **more)
    if tokenizer.fingerprint != metadata.fingerprint:
        raise MaxlmError(
            f"{codec.file_name} and {METADATA} do not belong together",
            where=str(folder),
            fix="copy both from one tokenizer, or train it again",
        )
    return tokenizer


def open_codec(kind: Kind, path: Path, special: Iterable[str] = (), data: bytes = b"") -> Codec:
    """A model file, opened.

    Args:
        path: the file, or the folder that has it under its usual name.
        special: literals that are special whatever the file says of them; used by "huggingface".
        data: what is in the file, if that was read or made already.

    Raises:
        MaxlmError: it is missing, unreadable, damaged, or of a sort that is not supported.
    """
    if path.is_dir():
        is_model = kind.startswith("sentencepiece")
        path /= (SentencePieceModel if is_model else ByteLevelBPE).file_name
    data = data or read_file(path)
    try:
        if kind in ("huggingface", "wordpiece"):
            return HuggingFaceModel(data, special)
        return ByteLevelBPE(data) if kind == "bpe" else SentencePieceModel(data)
    except MaxlmError as error:
        raise MaxlmError(error.what, where=str(path), fix=error.fix) from None
    except Exception as error:  # The libraries raise bare Exception, RuntimeError and KeyError.
        raise _damaged(path, str(error).strip() or type(error).__name__) from error


def holds_tokenizer(folder: str | PathLike[str]) -> bool:
    """Whether ``folder`` has any file that ``save`` would replace or remove."""
    return any((Path(folder) / name).exists() for name in (METADATA, *_MODEL_FILES, *CARRIED))


def save_tokenizer(tokenizer: CodecTokenizer, folder: Path) -> None:
    """Write all files. A new folder appears whole; in an old one each file is replaced whole, and
    a break on the way leaves a folder that fails to load."""
    metadata = TokenizerMetadata(
        format=_FORMAT,
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.special.bos,
        eos=tokenizer.special.eos,
        pad=tokenizer.special.pad,
        special_tokens=tokenizer.special.ids,
        fingerprint=tokenizer.fingerprint,
        opens=tokenizer.opens,
        stops=tokenizer.stops,
        carried=tuple(tokenizer.carried),
    )
    described = metadata.model_dump_json(indent=2, exclude_defaults=True).encode() + b"\n"
    contents = {**library_files(tokenizer), METADATA: described}
    stale = {*_MODEL_FILES, *CARRIED} - {*contents}
    write_files(contents, folder, stale)


def library_files(tokenizer: CodecTokenizer) -> dict[str, bytes]:
    """What other tools read of a tokenizer: its model file and the files it carries."""
    return {tokenizer.codec.file_name: tokenizer.codec.data, **tokenizer.carried}


def write_files(contents: dict[str, bytes], folder: Path, stale: Iterable[str] = ()) -> None:
    """Write files into a folder, each whole or not at all, and remove the stale ones.

    Raises:
        MaxlmError: the folder cannot be written.
    """
    within = folder if folder.exists() else folder.parent
    part = within / f".tokenizer.part.{os.getpid()}"
    # Left by a killed process of this id: in containers ids repeat.
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
    """A file's bytes.

    Raises:
        MaxlmError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MaxlmError(
            "no such file",
            where=str(path),
            fix="name a folder that `maxlm tokenizer train` wrote",
        ) from error
    except OSError as error:
        raise MaxlmError(
            f"cannot read it: {error.strerror}", where=str(path), fix="make it readable"
        ) from error


def _damaged(path: Path, fault: str) -> MaxlmError:
    return MaxlmError(
        f"damaged tokenizer file ({' '.join(fault.split())})",
        where=str(path),
        fix="copy it again from a good tokenizer, or train it again",
    )
