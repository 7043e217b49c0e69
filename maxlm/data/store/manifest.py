"""What a token store says about itself."""

import os
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from maxlm.config import Config, MaxlmError
from maxlm.data.corpus.config import BadBytes
from maxlm.data.corpus.files import Format

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

Split = Literal["train", "heldout", "all"]


class Source(Config):
    """One source file, and what the store took from it."""

    name: str
    """The path as it was given, or the path inside the standard library."""
    format: Format
    size: int
    """Bytes on disk."""
    sha256: str
    """Of the bytes on disk."""
    num_documents: int
    """Documents in the store (so: in its split)."""
    text_bytes: int
    """Bytes of those documents' text."""
    num_left_out: int
    """Documents that were empty, or left out by `on_bad_bytes="skip"`."""


class Manifest(Config):
    """A token store's description; equal inputs give equal manifests, byte for byte."""

    format_version: int
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer's content."""
    vocab_size: int
    bos_id: int | None
    """What documents open with; null: nothing."""
    eos_id: int
    dtype: Literal["uint16", "uint32"]
    num_tokens: int
    """All tokens, with the bos (if any) and the eos of each document."""
    num_documents: int
    text_bytes: int
    """Bytes of text behind the tokens: what bits per byte divides by."""
    split: Split
    heldout_fraction: float
    """Share of documents held out; 0 for the split "all"."""
    text_field: str
    on_bad_bytes: BadBytes
    piece_bytes: int | None = None
    num_binary_files: int
    """Files passed over as binary."""
    sources: tuple[Source, ...]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a store folder, whole or not at all."""
    temporary = folder / f".{MANIFEST_NAME}.{os.getpid()}"
    temporary.write_text(manifest.model_dump_json(indent=1) + "\n")
    os.replace(temporary, folder / MANIFEST_NAME)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store folder.

    Raises:
        MaxlmError: no store there, or a manifest that is damaged or of another format version.
    """
    path = folder / MANIFEST_NAME
    rebuild = "build the store again with maxlm corpus build"
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MaxlmError("there is no token store here", where=str(folder), fix=rebuild) from error
    except (OSError, UnicodeDecodeError) as error:
        raise MaxlmError(f"cannot read: {error}", where=str(path), fix=rebuild) from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"damaged manifest ({key + ': ' if key else ''}{first['msg']})"
        raise MaxlmError(what, where=str(path), fix=rebuild) from error
    if manifest.format_version != FORMAT_VERSION:
        what = f"store format {manifest.format_version}; this maxlm reads {FORMAT_VERSION}"
        raise MaxlmError(what, where=str(path), fix=rebuild)
    return manifest
