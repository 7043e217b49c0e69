"""A tokenizer's folder: the library's model file and ``maxlm_tokenizer.json`` beside it."""

import os
import shutil
from os import PathLike
from pathlib import Path

from pydantic import ValidationError

from maxlm.config import Config, MaxlmError
from maxlm.data.tokenizer.bpe import ByteLevelBPE
from maxlm.data.tokenizer.codec import CodecTokenizer, SpecialTokens
from maxlm.data.tokenizer.config import Kind
from maxlm.data.tokenizer.interface import Tokenizer
from maxlm.data.tokenizer.sentencepiece_model import SentencePieceModel

METADATA = "maxlm_tokenizer.json"
_FORMAT = 1
_MODEL_FILES = (ByteLevelBPE.file_name, SentencePieceModel.file_name)


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
    try:
        metadata = TokenizerMetadata.model_validate_json(_read(path))
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
    codec_type = ByteLevelBPE if metadata.kind == "bpe" else SentencePieceModel
    path = folder / codec_type.file_name
    data = _read(path)
    try:
        codec = codec_type(data)
    except Exception as error:  # The libraries raise bare Exception, RuntimeError and KeyError.
        raise _damaged(path, str(error).strip() or type(error).__name__) from error
    special = SpecialTokens(
        metadata.special_tokens, bos=metadata.bos, eos=metadata.eos, pad=metadata.pad
    )
    tokenizer = CodecTokenizer(metadata.kind, codec, special)
    if tokenizer.fingerprint != metadata.fingerprint:
        raise MaxlmError(
            f"{codec_type.file_name} and {METADATA} do not belong together",
            where=str(folder),
            fix="copy both from one tokenizer, or train it again",
        )
    return tokenizer


def holds_tokenizer(folder: str | PathLike[str]) -> bool:
    """Whether ``folder`` has any file that ``save`` would replace or remove."""
    return any((Path(folder) / name).exists() for name in (METADATA, *_MODEL_FILES))


def save_tokenizer(tokenizer: CodecTokenizer, folder: Path) -> None:
    """Write both files. A new folder appears whole; in an old one each file is replaced whole, and
    a break between the two leaves a folder that fails to load."""
    metadata = TokenizerMetadata(
        format=_FORMAT,
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.special.bos,
        eos=tokenizer.special.eos,
        pad=tokenizer.special.pad,
        special_tokens=tokenizer.special_tokens,
        fingerprint=tokenizer.fingerprint,
    )
    contents = {
        tokenizer.codec.file_name: tokenizer.codec.data,
        METADATA: metadata.model_dump_json(indent=2).encode() + b"\n",
    }
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
            for name in {*_MODEL_FILES} - {*contents}:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise MaxlmError(
            f"cannot write the tokenizer: {error.strerror}",
            where=str(folder),
            fix="choose a folder you may write to",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read(path: Path) -> bytes:
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
