"""Other people's tokenizers, of Hugging Face checkpoint folders or single files: taken in, and
given back file by file."""

import json
from collections.abc import Collection, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import SpecialTokens, Tokenizer
from maxlm.data.tokenizer.files import CARRIED, read_file, write_files
from maxlm.data.tokenizer.huggingface import HuggingFaceModel
from maxlm.data.tokenizer.load import load_tokenizer, open_codec
from maxlm.data.tokenizer.rank_files import (
    END_OF_TEXT,
    SCHEME,
    convert_rank_file,
    is_rank_file,
    read_shipped_ranks,
)
from maxlm.data.tokenizer.sentencepiece_model import SentencePieceModel

_CONVERT = (
    "let transformers write tokenizer.json: AutoTokenizer.from_pretrained(folder)"
    ".save_pretrained(folder)"
)


def import_tokenizer(
    source: str | PathLike[str],
    *,
    rows: int | None = None,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    pattern: str | None = None,
) -> Tokenizer:
    """Someone else's tokenizer.

    Of a folder tokenizer.json decides the ids. bos, eos and pad are those of
    tokenizer_config.json, else of special_tokens_map.json, else of generation_config.json and
    config.json. Generation stops at eos and at every eos_token_id of generation_config.json, else
    of config.json. Without a bos a document's eos stands for it. Documents and prompts open with
    bos if the tokenizer itself puts one before a text (its post_processor; add_bos_token if it has
    none). Without tokenizer.json a tokenizer.model is taken if it is such as maxlm trains.

    Of a single file only that file is looked at.

    Args:
        source: the folder of a Hugging Face checkpoint; a tokenizer.json, a SentencePiece model
            or a tiktoken rank file, whatever its name; or "tiktoken:cl100k_base" or
            "tiktoken:o200k_base".
        rows: of the model's table. Special tokens past it, but for bos and eos, are unknown to the
            tokenizer, in tokenizer.json alone; its files stay as they are. Some models were
            published with such, for images (Gemma 3) or of a larger relative (BART).
        bos, eos, pad: literals of tokens that have these roles, whatever the files say.
        pattern: how a rank file that is not a known one splits text: a name in ``PATTERNS``.

    Raises:
        MaxlmError: no tokenizer there; files that are damaged; a decoder or a folder's
            SentencePiece model that is not supported; no token to close documents with; a pattern
            that is not known, or where it does not belong.
    """
    roles = {"bos": bos, "eos": eos, "pad": pad}
    if str(source).startswith(SCHEME):
        data = read_shipped_ranks(str(source).removeprefix(SCHEME))
        return _from_ranks(data, Path(source), roles, pattern)
    path = Path(source)
    if path.is_file():
        data = read_file(path)
        if is_rank_file(data):
            return _from_ranks(data, path, roles, pattern)
        _refuse_pattern(pattern, path)
        if data.lstrip()[:1] == b"{":
            return _from_json(path, roles, rows)
        return _from_sentencepiece(path, roles)
    if not path.exists():
        raise MaxlmError(
            "no such folder",
            where=str(path),
            fix="name a Hugging Face checkpoint's folder, a tokenizer's file or "
            "tiktoken:cl100k_base",
        )
    _refuse_pattern(pattern, path)
    if (path / HuggingFaceModel.file_name).exists():
        return _from_json(path, roles, rows)
    if (path / SentencePieceModel.file_name).exists():
        return _from_sentencepiece(path, roles)
    raise MaxlmError("no tokenizer.json here", where=str(path), fix=_CONVERT)


def _refuse_pattern(pattern: str | None, path: Path) -> None:
    if pattern is not None:
        raise MaxlmError(
            "this is no rank file, and says itself how text is split",
            where=str(path),
            fix="leave the pattern out",
        )


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
    write_files(tokenizer.library_files(), Path(folder))


def _from_ranks(
    data: bytes, path: Path, roles: dict[str, str | None], pattern: str | None
) -> Tokenizer:
    data, special = convert_rank_file(data, str(path), pattern, roles["eos"])
    roles["eos"] = roles["eos"] or END_OF_TEXT
    return _from_json(path, roles, data=data, special=special)


def _from_json(
    path: Path,
    roles: dict[str, str | None],
    rows: int | None = None,
    data: bytes = b"",
    special: Iterable[str] = (),
) -> Tokenizer:
    codec = open_codec("huggingface", path, special, data)
    assert isinstance(codec, HuggingFaceModel)
    ids = codec.vocabulary()
    within = {token for token, i in ids.items() if rows is None or i < rows}
    settings = _Settings(path, ids, roles)
    before, after = codec.surrounding_ids()
    own = {"bos": codec.token(before[0]) if before else None}
    own["eos"] = codec.token(after[0]) if after else None
    bos = roles["bos"] or own["bos"] or settings.role("bos")
    eos = settings.role("eos") or own["eos"] or bos
    pad = settings.role("pad")
    pad = pad if pad in within else None
    bos, eos = _both(bos, eos, path)
    opens = bool(before) or (not codec.has_post_processor and settings.adds_bos(default=False))
    # Again, now that the literals of all special tokens are known.
    literals = {*codec.special_tokens.keys() & within, *filter(None, (bos, eos, pad))}
    if literals != {*special}:
        codec = open_codec("huggingface", path, literals, codec.data)
        assert isinstance(codec, HuggingFaceModel)
    return Tokenizer(
        "huggingface",
        codec,
        SpecialTokens(codec.special_tokens, bos=bos, eos=eos, pad=pad),
        opens=opens,
        stops=settings.find_end_ids(within),
        carried=_carried(path, codec.file_name),
    )


def _from_sentencepiece(path: Path, roles: dict[str, str | None]) -> Tokenizer:
    codec = open_codec("sentencepiece_bpe", path)
    assert isinstance(codec, SentencePieceModel)
    control = codec.control_tokens()
    if path.is_file():
        roles = {name: given or codec.role(name) for name, given in roles.items()}
    settings = _Settings(path, control, roles)
    # Of a checkpoint transformers may make more than its model file says.
    if path.is_dir() and (not codec.lossless or settings.adds_tokens):
        raise MaxlmError(
            "this SentencePiece model changes text, lacks bytes or has tokens added beside it",
            where=str(path / codec.file_name),
            fix=_CONVERT,
        )
    named = settings.role("bos")
    bos, eos = _both(named, settings.role("eos") or named, path)
    return Tokenizer(
        "sentencepiece_unigram" if codec.is_unigram() else "sentencepiece_bpe",
        codec,
        SpecialTokens(control, bos=bos, eos=eos, pad=settings.role("pad")),
        opens=named is not None and settings.adds_bos(default=True),
        stops=settings.find_end_ids(control),
        carried=_carried(path, codec.file_name),
    )


def _both(bos: str | None, eos: str | None, path: Path) -> tuple[str, str]:
    if eos is None:
        raise MaxlmError(
            "no token is named to close a document with",
            where=str(path / "tokenizer_config.json" if path.is_dir() else path),
            fix='name one of the vocabulary there as "eos_token"'
            if path.is_dir()
            else "name one of the vocabulary as eos (--eos of `maxlm tokenizer import`)",
        )
    return bos or eos, eos


def _carried(folder: Path, model: str) -> dict[str, bytes]:
    names = (name for name in CARRIED if name != model and (folder / name).is_file())
    return {name: read_file(folder / name) for name in names}


class _Settings:
    """The roles that a folder's JSON files give to tokens of a vocabulary.

    Args:
        folder: a file has no others beside it.
        ids: the tokens that may have a role.
        given: roles that were named by hand.

    Raises:
        MaxlmError: a file is not JSON; a token named by hand is not in the vocabulary.
    """

    def __init__(self, folder: Path, ids: dict[str, int], given: dict[str, str | None]):
        if missing := [token for token in given.values() if token and token not in ids]:
            raise MaxlmError(
                f"the vocabulary has no token {missing[0]!r}",
                where=str(folder),
                fix="name one that it has",
            )
        self._ids = ids
        self._given = given
        self._tokenizer = _json(folder / "tokenizer_config.json")
        self._by_token = (self._tokenizer, _json(folder / "special_tokens_map.json"))
        names = ("generation_config.json", "config.json")
        self._by_id = tuple(_json(folder / name) for name in names)
        self.adds_tokens = bool(_json(folder / "added_tokens.json"))

    def role(self, name: str) -> str | None:
        """The literal of the token called bos, eos or pad, if the vocabulary has it."""
        if given := self._given[name]:
            return given
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

    def find_end_ids(self, within: Collection[str]) -> list[int]:
        """The ids that generation stops at: generation_config.json's, else config.json's.

        Args:
            within: tokens of the vocabulary that a model can write.
        """
        known = {i for token, i in self._ids.items() if token in within}
        for settings in self._by_id:
            named = settings.get("eos_token_id")
            if named is not None:
                several = named if isinstance(named, list) else [named]
                return [i for i in several if type(i) is int and i in known]
        return []

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
