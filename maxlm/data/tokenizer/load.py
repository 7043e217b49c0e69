"""Opening saved tokenizers."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.data.tokenizer import files
from maxlm.data.tokenizer.codec import Codec, SpecialTokens, Tokenizer
from maxlm.data.tokenizer.config import Kind
from maxlm.data.tokenizer.huggingface import HuggingFaceModel
from maxlm.data.tokenizer.sentencepiece_model import SentencePieceModel


def load_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """Load the tokenizer saved in ``folder``.

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
    path = folder / files.METADATA
    if not path.exists() and (folder / files.JSON_FILE).exists():
        raise MaxlmError(
            f"no {files.METADATA} here, but a {files.JSON_FILE}",
            where=str(folder),
            fix="make a tokenizer of it with `maxlm tokenizer import`",
        )
    try:
        metadata = files.TokenizerMetadata.model_validate_json(files.read_file(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        fault = f"{field}: {first['msg']}" if field else first["msg"]
        raise files.describe_damaged_file(path, fault) from error
    if metadata.format != files.FORMAT:
        raise MaxlmError(
            f"tokenizer format {metadata.format} is not {files.FORMAT}",
            where=str(path),
            fix="read it with the version of maxlm that wrote it",
        )
    if unknown := {*metadata.carried} - {*files.CARRIED}:
        raise files.describe_damaged_file(path, f"carried: {min(unknown)}")
    if invalid := [i for i in metadata.stops if not 0 <= i < metadata.vocab_size]:
        raise files.describe_damaged_file(path, f"stops: {invalid[0]}")
    codec = open_codec(metadata.kind, folder, metadata.special_tokens)
    tokenizer = Tokenizer(
        metadata.kind,
        codec,
        SpecialTokens(metadata.special_tokens, metadata.bos, metadata.eos, metadata.pad),
        opens=metadata.opens,
        stops=metadata.stops,
        carried={name: files.read_file(folder / name) for name in metadata.carried},
    )
    if tokenizer.fingerprint != metadata.fingerprint:
        raise MaxlmError(
            f"{codec.file_name} and {files.METADATA} do not belong together",
            where=str(folder),
            fix="copy both from one tokenizer, or train it again",
        )
    return tokenizer


def open_codec(kind: Kind, path: Path, special: Iterable[str] = (), data: bytes = b"") -> Codec:
    """Open a model file.

    Args:
        path: the file, or the folder that has it under its usual name.
        special: literals that are special even if a tokenizer.json does not mark them.
        data: the file's content, if it was read or made already.

    Raises:
        MaxlmError: the file is missing, unreadable, damaged, or of a sort that is not supported.
    """
    is_sentencepiece = kind.startswith("sentencepiece")
    if path.is_dir():
        path /= files.SENTENCEPIECE_FILE if is_sentencepiece else files.JSON_FILE
    data = data or files.read_file(path)
    try:
        return SentencePieceModel(data) if is_sentencepiece else HuggingFaceModel(data, special)
    except MaxlmError as error:
        raise MaxlmError(error.what, where=str(path), fix=error.fix) from None
    except Exception as error:  # The libraries raise bare Exception, RuntimeError and KeyError.
        fault = str(error).strip() or type(error).__name__
        raise files.describe_damaged_file(path, fault) from error
