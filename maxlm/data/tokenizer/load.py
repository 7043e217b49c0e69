"""Opening tokenizers: saved ones, and those of Hugging Face checkpoints or single
files."""

from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from maxlm.config import MaxlmError
from maxlm.data.tokenizer import files
from maxlm.data.tokenizer.codec import SpecialTokens, Tokenizer
from maxlm.data.tokenizer.files import read_file
from maxlm.data.tokenizer.huggingface import HuggingFaceCodec
from maxlm.data.tokenizer.rank_files import END_OF_TEXT, convert_rank_file, is_rank_file
from maxlm.data.tokenizer.sentencepiece_model import SentencePieceCodec
from maxlm.runtime.json_files import read_json_object

CodecType = TypeVar("CodecType", HuggingFaceCodec, SentencePieceCodec)
_CONVERT = (
    "let transformers write tokenizer.json: AutoTokenizer.from_pretrained(folder)"
    ".save_pretrained(folder)"
)


def load_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """Load the tokenizer saved in ``folder``."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "no such folder" if not folder.exists() else "not a folder"
        fix = "name a folder that `maxlm tokenizer train` wrote"
        raise MaxlmError(what, where=str(folder), fix=fix)
    metadata = files.read_metadata(folder)
    if metadata.kind.startswith("sentencepiece"):
        codec = _open_codec(SentencePieceCodec, folder / SentencePieceCodec.file_name)
    else:
        settings = {
            "special": metadata.special_tokens,
            "splits_by_pattern": metadata.kind == "bpe",
        }
        codec = _open_codec(
            HuggingFaceCodec, folder / HuggingFaceCodec.file_name, **settings
        )
    tokenizer = Tokenizer(
        metadata.kind,
        codec,
        SpecialTokens(
            metadata.special_tokens, metadata.bos, metadata.eos, metadata.pad
        ),
        opens_with_bos=metadata.opens,
        extra_stop_ids=metadata.stops,
        extra_files={name: read_file(folder / name) for name in metadata.carried},
    )
    if tokenizer.fingerprint != metadata.fingerprint:
        what = f"{codec.file_name} and {files.METADATA} do not belong together"
        fix = "copy both from one tokenizer, or train it again"
        raise MaxlmError(what, where=str(folder), fix=fix)
    return tokenizer


def import_tokenizer(
    source: str | PathLike[str],
    *,
    num_embedding_rows: int | None = None,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    pattern: str | None = None,
    special_tokens: Mapping[str, int | None] | None = None,
) -> Tokenizer:
    """Imports someone else's tokenizer; docs/tokenizers.md says which of its files
    decides what.

    Args:
        source: the folder of a Hugging Face checkpoint; or a tokenizer.json, a
            SentencePiece model or a tiktoken rank file, whatever its name. Of a single
            file only that file is looked at.
        num_embedding_rows: of the model's table. Special tokens past it, but for bos
            and eos, are unknown to the tokenizer, in tokenizer.json alone; its files
            stay as they are. Some models were published with such, for images (Gemma 3)
            or of a larger relative (BART).
        bos, eos, pad: literals of tokens that have these roles, whatever the files say.
        pattern, special_tokens: of a rank file, which does not say them; see
            `convert_rank_file`. Literals that have a role are special tokens, too;
            without any, ``<|endoftext|>`` is the eos.
    """
    roles = {"bos": bos, "eos": eos, "pad": pad}
    path = Path(source)
    if not path.exists():
        fix = "name a Hugging Face checkpoint's folder or a tokenizer's file"
        raise MaxlmError("no such folder", where=str(path), fix=fix)
    if path.is_file():
        file = path
        is_json = read_file(path).lstrip()[:1] == b"{"
    else:
        is_json = (path / files.JSON_FILE).exists()
        file = path / (files.JSON_FILE if is_json else files.SENTENCEPIECE_FILE)
        if not file.exists():
            raise MaxlmError("no tokenizer.json here", where=str(path), fix=_CONVERT)
    if not is_json:
        data = read_file(file)
        if is_rank_file(data):
            return _from_rank_file(file, data, roles, pattern, special_tokens or {})
    if pattern is not None or special_tokens:
        message = "this is no rank file, and says itself how text is split and what is special"
        raise MaxlmError(
            message, where=str(file), fix="leave the pattern and special tokens out"
        )
    if is_json:
        return _from_json(path, roles, num_embedding_rows)
    return _from_sentencepiece(path, roles)


def export_tokenizer(tokenizer: Tokenizer, folder: str | PathLike[str]) -> None:
    """Write a tokenizer's files for other tools: an imported one's are those it came
    with. Other files of the folder stay."""
    files.write_files(tokenizer.files_to_export(), Path(folder))


def _open_codec(
    codec_type: type[CodecType],
    path: Path,
    *,
    data: bytes | None = None,
    **settings: Any,
) -> CodecType:
    """Opens a file; ``data``: its content, if it was read, or made of it."""
    data = read_file(path) if data is None else data
    try:
        return codec_type(data, **settings)
    except MaxlmError as error:
        raise MaxlmError(error.what, where=str(path), fix=error.fix) from None
    except (
        Exception
    ) as error:  # The libraries raise bare Exception, RuntimeError and KeyError.
        fault = str(error).strip() or type(error).__name__
        raise files.make_damaged_file_error(path, fault) from error


def _from_rank_file(
    path: Path,
    data: bytes,
    roles: dict[str, str | None],
    pattern: str | None,
    special_tokens: Mapping[str, int | None],
) -> Tokenizer:
    literals = [literal for literal in roles.values() if literal]
    if not literals and not special_tokens:
        literals = [END_OF_TEXT]
    id_by_literal = dict.fromkeys(literals) | dict(special_tokens)
    converted, special = convert_rank_file(data, str(path), pattern, id_by_literal)
    eos = roles["eos"] or (
        END_OF_TEXT if END_OF_TEXT in special else next(iter(special))
    )
    return _from_json(path, roles | {"eos": eos}, data=converted)


def _from_json(
    path: Path,
    roles: dict[str, str | None],
    rows: int | None = None,
    *,
    data: bytes | None = None,
) -> Tokenizer:
    """Makes a tokenizer of a tokenizer.json; ``data``: what it would hold, made of
    another file."""
    file = path / HuggingFaceCodec.file_name if path.is_dir() else path
    codec = _open_codec(HuggingFaceCodec, file, data=data)
    ids = codec.get_vocab()
    within = {token for token, i in ids.items() if rows is None or i < rows}
    settings = _Settings(path, ids, roles)
    before, after = codec.get_prefix_and_suffix()
    bos = roles["bos"] or (before[0] if before else settings.role("bos"))
    eos = settings.role("eos") or (after[0] if after else bos)
    pad = settings.role("pad")
    pad = pad if pad in within else None
    bos, eos = _both(bos, eos, path)
    opens = bool(before) or (
        not codec.has_post_processor and settings.adds_bos(default=False)
    )
    # Again, now that the literals of all special tokens are known.
    if literals := {
        *codec.special_tokens.keys() & within,
        *filter(None, (bos, eos, pad)),
    }:
        codec = _open_codec(HuggingFaceCodec, file, data=data, special=literals)
    return Tokenizer(
        "huggingface",
        codec,
        SpecialTokens(codec.special_tokens, bos=bos, eos=eos, pad=pad),
        opens_with_bos=opens,
        extra_stop_ids=settings.find_end_ids(within),
        extra_files=_carried(path, codec.file_name),
    )


def _from_sentencepiece(path: Path, roles: dict[str, str | None]) -> Tokenizer:
    file = path / SentencePieceCodec.file_name if path.is_dir() else path
    codec = _open_codec(SentencePieceCodec, file)
    control = codec.control_tokens()
    if path.is_file():
        roles = {
            name: given or codec.find_special_piece(name)
            for name, given in roles.items()
        }
    settings = _Settings(path, control, roles)
    # Of a checkpoint transformers may make more than its model file says.
    if path.is_dir() and (not codec.lossless or settings.adds_tokens):
        what = "this SentencePiece model changes text, lacks bytes or has tokens added beside it"
        raise MaxlmError(what, where=str(file), fix=_CONVERT)
    named = settings.role("bos")
    bos, eos = _both(named, settings.role("eos") or named, path)
    return Tokenizer(
        "sentencepiece_unigram" if codec.is_unigram() else "sentencepiece_bpe",
        codec,
        SpecialTokens(control, bos=bos, eos=eos, pad=settings.role("pad")),
        opens_with_bos=named is not None and settings.adds_bos(default=True),
        extra_stop_ids=settings.find_end_ids(control),
        extra_files=_carried(path, codec.file_name),
    )


def _both(bos: str | None, eos: str | None, path: Path) -> tuple[str, str]:
    if eos is None:
        fix = "name one of the vocabulary as eos (--eos of `maxlm tokenizer import`)"
        raise MaxlmError(
            "no token is named to close a document with", where=str(path), fix=fix
        )
    return bos or eos, eos


def _carried(folder: Path, model: str) -> dict[str, bytes]:
    names = (
        name for name in files.CARRIED if name != model and (folder / name).is_file()
    )
    return {name: read_file(folder / name) for name in names}


class _Settings:
    """The roles that a folder's JSON files, or ``given`` by hand, give to tokens of a
    vocabulary.

    A folder that is a file has no others beside it.
    """

    def __init__(self, folder: Path, ids: dict[str, int], given: dict[str, str | None]):
        if missing := [token for token in given.values() if token and token not in ids]:
            what = f"the vocabulary has no token {missing[0]!r}"
            raise MaxlmError(what, where=str(folder), fix="name one that it has")
        self._ids, self._given = ids, given
        self._tokenizer = _json(folder / "tokenizer_config.json")
        self._by_token = (self._tokenizer, _json(folder / "special_tokens_map.json"))
        names = ("generation_config.json", "config.json")
        self._by_id = tuple((folder / name, _json(folder / name)) for name in names)
        self.adds_tokens = bool(_json(folder / "added_tokens.json"))

    def role(self, name: str) -> str | None:
        """The literal of the token called bos, eos or pad, if the vocabulary has it."""
        if given := self._given[name]:
            return given
        for settings in self._by_token:
            token = settings.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in self._ids:
                return token
        literals = {i: token for token, i in self._ids.items()}
        for path, settings in self._by_id:
            # Several may end generation; the first is the document's.
            for i in _read_ids(path, settings, f"{name}_token_id")[:1]:
                if i in literals:
                    return literals[i]
        return None

    def find_end_ids(self, within: Collection[str]) -> list[int]:
        """The ids, of tokens ``within``, that generation stops at:
        generation_config.json's, else config.json's."""
        known = {i for token, i in self._ids.items() if token in within}
        for path, settings in self._by_id:
            if settings.get("eos_token_id") is not None:
                return [
                    i for i in _read_ids(path, settings, "eos_token_id") if i in known
                ]
        return []

    def adds_bos(self, *, default: bool) -> bool:
        value = self._tokenizer.get("add_bos_token")
        return self.role("bos") is not None and (
            default if value is None else bool(value)
        )


def _read_ids(path: Path, settings: Mapping[str, Any], key: str) -> list[int]:
    """The ids of one token or of several; none where there is no such key. Raises
    MaxlmError for what is no whole number: a model that does not know its end would
    never stop."""
    value = settings.get(key)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int:
            what = f"{key}={value!r} is no id of a token"
            fix = (
                "write a whole number, or a list of them, as the published model has it"
            )
            raise MaxlmError(what, where=str(path), fix=fix)
    return ids


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    return read_json_object(path, "copy the checkpoint's file again")
