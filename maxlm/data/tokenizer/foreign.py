"""Tokenizers of Hugging Face checkpoint folders: taken in, and given back file by file."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import CodecTokenizer, SpecialTokens
from maxlm.data.tokenizer.files import (
    CARRIED,
    library_files,
    load_tokenizer,
    open_codec,
    read_file,
    write_files,
)
from maxlm.data.tokenizer.huggingface import HuggingFaceModel
from maxlm.data.tokenizer.interface import Tokenizer
from maxlm.data.tokenizer.sentencepiece_model import SentencePieceModel

_CONVERT = (
    "let transformers write tokenizer.json: AutoTokenizer.from_pretrained(folder)"
    ".save_pretrained(folder)"
)
# What a SentencePiece model must give back: spaces are kept and none is added, nothing is
# normalised, and rare characters fall back to bytes.
_PROBES = ("a", " a", "a ", "a  b", "\t\n", "e\u0301é", "ﬁ Ａ", "\u3000\u00a0", "\U0010ffff☃")


def import_tokenizer(folder: str | PathLike[str], *, rows: int | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face checkpoint's folder.

    tokenizer.json decides the ids. bos, eos and pad are those of tokenizer_config.json, else of
    special_tokens_map.json, else of generation_config.json and config.json. Without a bos a
    document's eos stands for it. Documents and prompts open with bos if the tokenizer itself puts
    one before a text (its post_processor; add_bos_token if it has none).

    Without tokenizer.json a tokenizer.model is taken if it is such as maxlm trains.

    Args:
        rows: of the model's table. Special tokens past it, but for bos and eos, are unknown to the
            tokenizer, in tokenizer.json alone; its files stay as they are. Some models were
            published with such, for images (Gemma 3) or of a larger relative (BART).

    Raises:
        MaxlmError: no tokenizer there; files that are damaged; a decoder or a SentencePiece model
            that is not supported; no token to close documents with.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MaxlmError(
            "no such folder" if not folder.exists() else "not a folder",
            where=str(folder),
            fix="name the folder of a Hugging Face checkpoint",
        )
    if (folder / HuggingFaceModel.file_name).exists():
        return _from_json(folder, rows)
    if (folder / SentencePieceModel.file_name).exists():
        return _from_sentencepiece(folder)
    raise MaxlmError("no tokenizer.json here", where=str(folder), fix=_CONVERT)


def export_tokenizer(
    tokenizer: Tokenizer | str | PathLike[str], folder: str | PathLike[str]
) -> None:
    """Write a tokenizer's files for other tools: an imported one's are those it came with.

    Args:
        tokenizer: one of ``load_tokenizer`` or ``import_tokenizer``, or its folder.
        folder: where to; its other files stay.

    Raises:
        MaxlmError: the tokenizer cannot be loaded, or the folder not written.
    """
    if isinstance(tokenizer, (str, PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    assert isinstance(tokenizer, CodecTokenizer)
    write_files(library_files(tokenizer), Path(folder))


def _from_json(folder: Path, rows: int | None) -> CodecTokenizer:
    codec = open_codec("huggingface", folder)
    assert isinstance(codec, HuggingFaceModel)
    ids = codec.vocabulary()
    within = {token for token, i in ids.items() if rows is None or i < rows}
    settings = _Settings(folder, ids)
    before, after = codec.around()
    bos = codec.token(before[0]) if before else settings.role("bos")
    eos = settings.role("eos") or (codec.token(after[0]) if after else bos)
    pad = settings.role("pad")
    pad = pad if pad in within else None
    bos, eos = _both(bos, eos, folder)
    opens = bool(before) or (not codec.has_post_processor and settings.adds_bos(default=False))
    # Again, now that the literals of all special tokens are known.
    literals = {*codec.special_tokens.keys() & within, *filter(None, (bos, eos, pad))}
    codec = open_codec("huggingface", folder, literals)
    assert isinstance(codec, HuggingFaceModel)
    return CodecTokenizer(
        "huggingface",
        codec,
        SpecialTokens(codec.special_tokens, bos=bos, eos=eos, pad=pad),
        opens=opens,
        carried=_carried(folder, codec.file_name),
    )


def _from_sentencepiece(folder: Path) -> CodecTokenizer:
    codec = open_codec("sentencepiece_bpe", folder)
    assert isinstance(codec, SentencePieceModel)
    control = codec.control_tokens()
    settings = _Settings(folder, control)
    if not _is_exact(codec) or settings.adds_tokens:
        raise MaxlmError(
            "this SentencePiece model changes text, lacks bytes or has tokens added beside it",
            where=str(folder / codec.file_name),
            fix=_CONVERT,
        )
    named = settings.role("bos")
    bos, eos = _both(named, settings.role("eos") or named, folder)
    return CodecTokenizer(
        "sentencepiece_unigram" if codec.is_unigram() else "sentencepiece_bpe",
        codec,
        SpecialTokens(control, bos=bos, eos=eos, pad=settings.role("pad")),
        opens=named is not None and settings.adds_bos(default=True),
        carried=_carried(folder, codec.file_name),
    )


def _both(bos: str | None, eos: str | None, folder: Path) -> tuple[str, str]:
    if eos is None:
        raise MaxlmError(
            "no token is named to close a document with",
            where=str(folder / "tokenizer_config.json"),
            fix='name one of the vocabulary there as "eos_token"',
        )
    return bos or eos, eos


def _is_exact(codec: SentencePieceModel) -> bool:
    bytes_of = codec.token_bytes
    if [bytes_of[i] for i in codec.byte_ids or ()] != [bytes([byte]) for byte in range(256)]:
        return False
    encoded = codec.encode_segments(list(_PROBES))
    return all(
        b"".join(bytes_of[i] for i in ids) == text.encode()
        for text, ids in zip(_PROBES, encoded, strict=True)
    )


def _carried(folder: Path, model: str) -> dict[str, bytes]:
    names = (name for name in CARRIED if name != model and (folder / name).is_file())
    return {name: read_file(folder / name) for name in names}


class _Settings:
    """What the folder's JSON files say of a vocabulary.

    Args:
        ids: the tokens that may have a role.
    """

    def __init__(self, folder: Path, ids: dict[str, int]):
        self._ids = ids
        self._tokenizer = _json(folder / "tokenizer_config.json")
        self._by_token = (self._tokenizer, _json(folder / "special_tokens_map.json"))
        names = ("generation_config.json", "config.json")
        self._by_id = tuple(_json(folder / name) for name in names)
        self.adds_tokens = bool(_json(folder / "added_tokens.json"))

    def role(self, name: str) -> str | None:
        """The literal of the token called bos, eos or pad, if the vocabulary has it."""
        for settings in self._by_token:
            token = settings.get(f"{name}_token")
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str) and token in self._ids:
                return token
        literals = {i: token for token, i in self._ids.items()}
        for settings in self._by_id:
            i = settings.get(f"{name}_token_id")
            if isinstance(i, list):  # Several may end generation; the first is the document's.
                i = i[0] if i else None
            if isinstance(i, int) and i in literals:
                return literals[i]
        return None

    def adds_bos(self, *, default: bool) -> bool:
        value = self._tokenizer.get("add_bos_token")
        known = self.role("bos") is not None
        return known and (default if value is None else bool(value))


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_file(path))
    except ValueError as error:
        raise MaxlmError(
            f"not JSON ({error})", where=str(path), fix="copy the checkpoint's file again"
        ) from error
    if not isinstance(value, dict):
        raise MaxlmError(
            "not a JSON object", where=str(path), fix="copy the checkpoint's file again"
        )
    return value
