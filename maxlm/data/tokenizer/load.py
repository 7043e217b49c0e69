"""Opening tokenizers: saved ones, and those of Hugging Face checkpoints or single
files."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.data.tokenizer import files
from maxlm.data.tokenizer.codec import SpecialTokens, Tokenizer
from maxlm.data.tokenizer.files import read_file
from maxlm.data.tokenizer.huggingface import HuggingFaceCodec
from maxlm.data.tokenizer.rank_files import END_OF_TEXT, convert_rank_file, is_rank_file
from maxlm.data.tokenizer.sentencepiece_model import SentencePieceCodec
from maxlm.runtime.json_files import read_json_object

_CONVERT = (
    "let transformers write tokenizer.json: AutoTokenizer.from_pretrained(folder)"
    ".save_pretrained(folder)"
)


def load_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """Load the tokenizer saved in ``folder``."""
    folder = Path(folder)
    if not folder.is_dir():
        message = "no such folder" if not folder.exists() else "not a folder"
        fix = "name a folder that `maxlm tokenizer train` wrote"
        raise MaxlmError(message, where=str(folder), fix=fix)
    metadata = files.read_metadata(folder)
    if metadata.kind.startswith("sentencepiece"):
        codec = _open_sentencepiece(folder / SentencePieceCodec.file_name)
    else:
        codec = _open_huggingface(
            folder / HuggingFaceCodec.file_name,
            special=metadata.special_tokens,
            splits_by_pattern=metadata.kind == "bpe",
        )
    special = SpecialTokens(
        metadata.special_tokens, metadata.bos, metadata.eos, metadata.pad
    )
    tokenizer = Tokenizer(
        metadata.kind,
        codec,
        special,
        opens_with_bos=metadata.opens,
        extra_stop_ids=metadata.stops,
        extra_files={name: read_file(folder / name) for name in metadata.carried},
    )
    if tokenizer.fingerprint != metadata.fingerprint:
        message = f"{codec.file_name} and {files.METADATA} do not belong together"
        fix = "copy both from one tokenizer, or train it again"
        raise MaxlmError(message, where=str(folder), fix=fix)
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
            return _import_rank_file(file, data, roles, pattern, special_tokens or {})
    if pattern is not None or special_tokens:
        message = "this is no rank file, and says itself how text is split and what is special"
        fix = "leave the pattern and special tokens out"
        raise MaxlmError(message, where=str(file), fix=fix)
    if is_json:
        return _import_json(path, roles, num_embedding_rows)
    return _import_sentencepiece(path, roles)


def export_tokenizer(tokenizer: Tokenizer, folder: str | PathLike[str]) -> None:
    """Write a tokenizer's files for other tools: an imported one's are those it came
    with. Other files of the folder stay."""
    files.write_files(tokenizer.files_to_export(), Path(folder))


def _open_sentencepiece(path: Path) -> SentencePieceCodec:
    data = read_file(path)
    with _locate_errors(path):
        return SentencePieceCodec(data)


def _open_huggingface(
    path: Path,
    *,
    data: bytes | None = None,
    special: Iterable[str] = (),
    splits_by_pattern: bool = False,
) -> HuggingFaceCodec:
    """Opens a tokenizer.json; ``data``: its content, if it was made of ``path``."""
    if data is None:
        data = read_file(path)
    with _locate_errors(path):
        return HuggingFaceCodec(data, special, splits_by_pattern=splits_by_pattern)


@contextmanager
def _locate_errors(path: Path) -> Iterator[None]:
    """Names the file in what is wrong with it."""
    try:
        yield
    except MaxlmError as error:
        raise MaxlmError(error.message, where=str(path), fix=error.fix) from None
    # The libraries raise bare Exception, RuntimeError and KeyError for a damaged file.
    except Exception as error:
        fault = str(error).strip() or type(error).__name__
        raise files.make_damaged_file_error(path, fault) from error


def _import_rank_file(
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
    eos = roles["eos"]
    if not eos:
        eos = END_OF_TEXT if END_OF_TEXT in special else next(iter(special))
    return _import_json(path, roles | {"eos": eos}, data=converted)


def _import_json(
    path: Path,
    roles: dict[str, str | None],
    num_embedding_rows: int | None = None,
    *,
    data: bytes | None = None,
) -> Tokenizer:
    """Makes a tokenizer of a tokenizer.json; ``data``: what it would hold, made of
    another file."""
    file = path / HuggingFaceCodec.file_name if path.is_dir() else path
    codec = _open_huggingface(file, data=data)
    ids = codec.get_vocab()
    embedded_tokens = {
        token
        for token, token_id in ids.items()
        if num_embedding_rows is None or token_id < num_embedding_rows
    }
    settings = _Settings(path, ids, roles)
    # The tokens that the file's own post-processor puts around a text count more than
    # what the other files say of bos, but less than what they say of eos.
    prefix, suffix = codec.get_prefix_and_suffix()
    bos = roles["bos"]
    if not bos:
        bos = prefix[0] if prefix else settings.get_role("bos")
    eos = settings.get_role("eos")
    if not eos:
        eos = suffix[0] if suffix else bos
    pad = settings.get_role("pad")
    if pad not in embedded_tokens:
        pad = None
    bos, eos = _require_bos_and_eos(bos, eos, path)
    opens_with_bos = bool(prefix)
    if not prefix and not codec.has_post_processor:
        opens_with_bos = settings.adds_bos(default=False)
    literals = codec.special_tokens.keys() & embedded_tokens
    literals |= {bos, eos}
    if pad:
        literals.add(pad)
    # Again, now that the literals of all special tokens are known.
    codec = _open_huggingface(file, data=data, special=literals)
    return Tokenizer(
        "huggingface",
        codec,
        SpecialTokens(codec.special_tokens, bos=bos, eos=eos, pad=pad),
        opens_with_bos=opens_with_bos,
        extra_stop_ids=settings.find_end_ids(embedded_tokens),
        extra_files=_read_carried_files(path, codec.file_name),
    )


def _import_sentencepiece(path: Path, roles: dict[str, str | None]) -> Tokenizer:
    file = path / SentencePieceCodec.file_name if path.is_dir() else path
    codec = _open_sentencepiece(file)
    control_ids = codec.control_tokens()
    if path.is_file():
        # No other file says what the roles are; the model itself may.
        roles = {
            name: literal or codec.find_special_piece(name)
            for name, literal in roles.items()
        }
    settings = _Settings(path, control_ids, roles)
    # Of a checkpoint transformers may make more than its model file says.
    if path.is_dir() and (not codec.lossless or settings.adds_tokens):
        message = (
            "this SentencePiece model changes text, lacks bytes or has tokens added "
            "beside it"
        )
        raise MaxlmError(message, where=str(file), fix=_CONVERT)
    named_bos = settings.get_role("bos")
    named_eos = settings.get_role("eos")
    bos, eos = _require_bos_and_eos(named_bos, named_eos or named_bos, path)
    return Tokenizer(
        "sentencepiece_unigram" if codec.is_unigram() else "sentencepiece_bpe",
        codec,
        SpecialTokens(control_ids, bos=bos, eos=eos, pad=settings.get_role("pad")),
        opens_with_bos=named_bos is not None and settings.adds_bos(default=True),
        extra_stop_ids=settings.find_end_ids(control_ids),
        extra_files=_read_carried_files(path, codec.file_name),
    )


def _require_bos_and_eos(
    bos: str | None, eos: str | None, path: Path
) -> tuple[str, str]:
    """Returns both; without a bos documents are opened, if at all, with eos."""
    if eos is None:
        message = "no token is named to close a document with"
        fix = "name one of the vocabulary as eos (--eos of `maxlm tokenizer import`)"
        raise MaxlmError(message, where=str(path), fix=fix)
    return bos or eos, eos


def _read_carried_files(folder: Path, model_name: str) -> dict[str, bytes]:
    """The files of an imported tokenizer that are kept for export, by name."""
    return {
        name: read_file(folder / name)
        for name in files.CARRIED
        if name != model_name and (folder / name).is_file()
    }


class _Settings:
    """The roles that ``roles_by_hand``, or a folder's JSON files, give to tokens of a
    vocabulary.

    A folder that is a file has no others beside it.
    """

    def __init__(
        self, folder: Path, ids: dict[str, int], roles_by_hand: dict[str, str | None]
    ):
        for token in roles_by_hand.values():
            if token and token not in ids:
                message = f"the vocabulary has no token {token!r}"
                raise MaxlmError(message, where=str(folder), fix="name one that it has")
        self._ids = ids
        self._roles_by_hand = roles_by_hand
        self._tokenizer_config = _read_json(folder / "tokenizer_config.json")
        special_tokens_map = _read_json(folder / "special_tokens_map.json")
        # Those that name roles by literal, and those that do by id, in order of rank.
        self._files_of_literals = (self._tokenizer_config, special_tokens_map)
        paths = (folder / "generation_config.json", folder / "config.json")
        self._files_of_ids = tuple((path, _read_json(path)) for path in paths)
        self.adds_tokens = bool(_read_json(folder / "added_tokens.json"))

    def get_role(self, name: str) -> str | None:
        """The literal of the token called bos, eos or pad, if the vocabulary has it."""
        by_hand = self._roles_by_hand[name]
        if by_hand:
            return by_hand
        for settings in self._files_of_literals:
            token = settings.get(f"{name}_token")
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str) and token in self._ids:
                return token
        literal_by_id = {token_id: token for token, token_id in self._ids.items()}
        for path, settings in self._files_of_ids:
            ids = _read_ids(path, settings, f"{name}_token_id")
            # Several may end generation; the first is the document's.
            if ids and ids[0] in literal_by_id:
                return literal_by_id[ids[0]]
        return None

    def find_end_ids(self, tokens: Collection[str]) -> list[int]:
        """The ids, of these tokens, that generation stops at:
        generation_config.json's, else config.json's."""
        ids = {token_id for token, token_id in self._ids.items() if token in tokens}
        for path, settings in self._files_of_ids:
            if settings.get("eos_token_id") is not None:
                end_ids = _read_ids(path, settings, "eos_token_id")
                return [token_id for token_id in end_ids if token_id in ids]
        return []

    def adds_bos(self, *, default: bool) -> bool:
        """Whether documents open with bos, by ``add_bos_token`` or, if no file has it,
        by ``default``."""
        if self.get_role("bos") is None:
            return False
        value = self._tokenizer_config.get("add_bos_token")
        return default if value is None else bool(value)


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
            message = f"{key}={value!r} is no id of a token"
            fix = (
                "write a whole number, or a list of them, as the published model has it"
            )
            raise MaxlmError(message, where=str(path), fix=fix)
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    return read_json_object(path, "copy the checkpoint's file again")
