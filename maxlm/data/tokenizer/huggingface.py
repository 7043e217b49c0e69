"""A tokenizer.json, run by Hugging Face's `tokenizers`: trained by maxlm or of a
checkpoint.

The library decodes whole sequences. The decoders taken here treat tokens one by one,
but for the first of a text (whose leading space may be one that the encoder put there):
so each id has bytes of its own, and text can be streamed. Any other decoder is refused.
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Codec
from maxlm.data.tokenizer.files import JSON_FILE

if TYPE_CHECKING:
    import tokenizers
    import tokenizers.decoders

# A word, with one space or sign before it; digits by threes at most, so that numbers
# are spelled in few ways; punctuation, with the line ends that follow; blanks at a
# line's end, then line ends; indentation, less the blank that goes with a word. The
# first that matches takes a character.
PATTERN = (
    r"[^\p{L}\p{M}\p{N}\r\n]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|[^\S\r\n]*[\r\n]+|[^\S\r\n]+(?!\S)|[^\S\r\n]+"
)
"""Pattern by which our byte-level BPE tokenizers split a text: no merge crosses a
border."""
# By PATTERN nothing runs over a line end into a character that is not one itself, nor
# from a sign or letter into a space.
PATTERN_CUT = re.compile(r"\n(?![\r\n])|[!-~](?= )")
_NEVER = re.compile(r"(?!)")
_HIGH_BYTE = re.compile(r"<0x([89A-Fa-f][0-9A-Fa-f])>")
_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

# Kinds of pre-tokenizers that split a text without dropping any of it, but for a
# behaviour "Removed".
_SPLITTERS = frozenset(("ByteLevel", "Digits", "Split", "Punctuation", "Metaspace"))
_SPACE_SPLITTERS = frozenset(("BertPreTokenizer", "Whitespace", "WhitespaceSplit"))


class EncodingSteps(NamedTuple):
    """Steps from a text to its ids, as far as they decide how few ids there may be."""

    normalizers: list[dict[str, Any]]
    """Steps of the normalizer, as the file has them."""
    tokens_are_bytes: bool
    """Whether tokens' bytes are the text's, but for bytes that have no token, which are
    dropped."""
    pre_tokenizers_keep_text: bool
    splits_at_spaces: bool
    """Whether no token but an added one has characters from both sides of a space."""
    has_all_bytes: bool
    """Whether nothing is unknown: each byte has an id."""
    added_tokens_strip: bool
    """Whether an added token may take the spaces beside it."""
    longest_token: int
    """Characters of the longest token, as the file writes it."""


class HuggingFaceCodec(Codec):
    """A tokenizer.json as a ``Codec``; ids are the `tokenizers` library's own.

    A document is cut only if maxlm's own PATTERN splits it: another pre-tokeniser or
    normaliser may look past any character. What comes back of a text depends on the
    file: all of it, for any bytes, from byte-level BPE with all 256 bytes and no
    normaliser.

    Args:
        special: literals of special tokens, those too that the file does not mark as
            such. If there are any, others that the file marks are unknown here:
            ``left_out``.
        splits_by_pattern: whether the file is one that maxlm trained.
    """

    file_name = JSON_FILE
    reserved_chars = ""
    encodes_special_tokens = True

    def __init__(
        self,
        data: bytes,
        special: Iterable[str] = (),
        *,
        splits_by_pattern: bool = False,
    ):
        self.data = data
        self._special = tuple(special)
        self.cut_pattern = PATTERN_CUT if splits_by_pattern else _NEVER
        self._known_data, known_spec, self.left_out = _leave_out_special_tokens(
            data, self._special
        )
        self._library = _open(self._known_data, self._special)
        self._library.encode_special_tokens = True
        spec = {
            "normalizer": None,
            "pre_tokenizer": None,
            "decoder": None,
            **known_spec,
        }
        self.has_post_processor = spec.get("post_processor") is not None

        # The tokens by id. Ids between them that are no tokens have the empty one.
        vocab = self._library.get_vocab(with_added_tokens=False)
        added = self._library.get_added_tokens_decoder()
        size = max(self.get_vocab().values(), default=-1) + 1
        tokens = [self._library.id_to_token(i) or "" for i in range(size)]

        # Their bytes. The decoder is asked for each token alone.
        self._decoder = TokenDecoder(self._library.decoder, spec["decoder"])
        # Each with whether the model itself does not know it.
        self._tokens = [
            (token, i in added and vocab.get(token) != i)
            for i, token in enumerate(tokens)
        ]
        self.token_bytes = [self._bytes_of(i, first=False) for i in range(size)]

        # What of a text comes back, and by which steps it becomes ids.
        byte_ids = _find_byte_ids(spec, vocab)
        self.lossless = byte_ids is not None and _keeps_text(spec)
        self.steps = _read_steps(spec, byte_ids is not None, tokens)
        self.byte_ids = byte_ids if self.lossless else None
        self._sort_special_ids(spec["model"], vocab, tokens, byte_ids)

    def _sort_special_ids(
        self,
        model: dict[str, Any],
        vocab: dict[str, int],
        tokens: list[str],
        byte_ids: list[int] | None,
    ) -> None:
        """Tells the special ids that ordinary text may have from the forbidden ones,
        and finds other ids to write those with."""
        ids = [self._library.token_to_id(literal) for literal in self._special]
        self._special_ids = frozenset(i for i in ids if i is not None)
        # The bytes of characters outside the vocabulary, if the model has them.
        fallback_tokens = _FALLBACK if model.get("byte_fallback") else ()
        fallback_ids = frozenset(
            vocab[token] for token in fallback_tokens if token in vocab
        )
        self._pieces_to_avoid = self._special_ids - fallback_ids
        self._respelled: dict[int, list[int]] = {}
        for i in self._pieces_to_avoid:
            is_piece_of_model = vocab.get(tokens[i]) == i
            if is_piece_of_model:
                self._respelled[i] = self._respell(tokens[i])
        # With an id for every byte nothing is unknown.
        if byte_ids is None:
            # A Unigram model has the id, others the token.
            candidates = [model.get("unk_id")]
            if model.get("unk_token"):
                candidates.append(vocab.get(model["unk_token"]))
            self.unknown_ids = frozenset(i for i in candidates if i is not None)
        ids_of_text = self.unknown_ids.union(fallback_ids, *self._respelled.values())
        self.ordinary_special_ids = self._special_ids & ids_of_text
        self._forbidden_ids = self._special_ids - ids_of_text

    @property
    def known_data(self) -> bytes:
        """The tokenizer.json without the special tokens that are unknown here."""
        return self._known_data

    def __reduce__(self):
        is_own = self.cut_pattern is PATTERN_CUT
        rebuild = partial(HuggingFaceCodec, splits_by_pattern=is_own)
        return rebuild, (self.data, self._special)

    def encode_segments(self, segments: list[str]) -> list[list[int]]:
        return [self._without_special(ids) for ids in _encode(self._library, segments)]

    def encode_segments_with_special(
        self, segments: list[str], escape_char: str | None = None
    ) -> list[list[int]]:
        if escape_char is None:
            return _encode(self._library_with_special, segments)
        return [self._encode_with_escapes(segment, escape_char) for segment in segments]

    def _encode_with_escapes(self, segment: str, escape_char: str) -> list[int]:
        # The library sees the character, so that no literal which contains it is one;
        # the ids of the character itself go.
        library = self._library_with_special
        encoding = library.encode(segment, add_special_tokens=False)
        ids: list[int] = []
        for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            span = segment[start:stop]
            if span == escape_char:
                continue
            if escape_char in span:
                ids += self._without_special([i])
            else:
                ids.append(i)
        return ids

    def _without_special(self, ids: list[int]) -> list[int]:
        # The library looks for no special token, but the model may have one as a piece.
        if self._forbidden_ids.isdisjoint(ids):
            return ids
        ordinary_ids: list[int] = []
        for i in ids:
            if i in self._forbidden_ids:
                ordinary_ids += self._respelled[i]
            else:
                ordinary_ids.append(i)
        return ordinary_ids

    def bytes_at_text_start(self, token_id: int) -> bytes:
        return self._bytes_of(token_id, first=True)

    def fingerprint_input(self) -> bytes:
        known_spec = json.loads(self._known_data)
        spec = {"normalizer": None, "pre_tokenizer": None, **known_spec}
        names = ("normalizer", "pre_tokenizer", "model", "added_tokens")
        parts = {name: spec[name] for name in names}
        return json.dumps(parts, sort_keys=True).encode()

    @property
    def special_tokens(self) -> dict[str, int]:
        """Tokens that are marked as special, in the file or by ``special``, in order of
        id."""
        added = self._library.get_added_tokens_decoder()
        return {added[i].content: i for i in sorted(added) if added[i].special}

    def get_vocab(self) -> dict[str, int]:
        """Every token's id."""
        return self._library.get_vocab(with_added_tokens=True)

    def get_prefix_and_suffix(self) -> tuple[list[str], list[str]]:
        """The tokens that the library puts before and after a text when asked for
        special ones."""
        encoding = self._library_with_special.encode("a")
        text_places = [
            place
            for place, is_special in enumerate(encoding.special_tokens_mask)
            if not is_special
        ]
        if not text_places:
            return [], []
        prefix = encoding.tokens[: text_places[0]]
        suffix = encoding.tokens[text_places[-1] + 1 :]
        return prefix, suffix

    @cached_property
    def _library_with_special(self) -> "tokenizers.Tokenizer":
        """A second library, which reads special tokens: its switch is one for all
        threads."""
        return _open(self._known_data, self._special)

    def _bytes_of(self, i: int, *, first: bool) -> bytes:
        token, is_added = self._tokens[i]
        if not token:
            return b""
        return self._decoder.decode(token, first=first, is_added=is_added)

    def _respell(self, token: str) -> list[int]:
        """Ids of a piece's characters without special ones, as far as the vocabulary
        has them."""
        ids = [piece.id for piece in self._library.model.tokenize(token)]
        if len(token) < 2 or self._pieces_to_avoid.isdisjoint(ids):
            return ids
        return self._respell(token[:1]) + self._respell(token[1:])


def _encode(library: "tokenizers.Tokenizer", segments: list[str]) -> list[list[int]]:
    # The batch call starts a thread pool, which a later fork would then have to do
    # without.
    if len(segments) == 1:
        return [library.encode(segments[0], add_special_tokens=False).ids]
    encodings = library.encode_batch_fast(segments, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _open(data: bytes, special: Iterable[str]) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    # Settings of some training run that such files carry along.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    added = {
        token.content: token for token in tokenizer.get_added_tokens_decoder().values()
    }
    newly_special = []
    for literal in special:
        token = added.get(literal)
        if token is None:
            flags = dict.fromkeys(_ADDED_TOKEN_FLAGS, False)
        elif token.special:
            continue
        else:
            flags = {name: getattr(token, name) for name in _ADDED_TOKEN_FLAGS}
        newly_special.append(AddedToken(literal, special=True, **flags))
    tokenizer.add_special_tokens(newly_special)
    return tokenizer


def _leave_out_special_tokens(
    data: bytes, special: tuple[str, ...]
) -> tuple[bytes, dict[str, Any], tuple[str, ...]]:
    """A file without the tokens that it marks as special and ``special`` lacks, what is
    in it, and these tokens. Without any ``special`` the file stays as it is."""
    spec = json.loads(data)
    added = spec.get("added_tokens") or []
    marked = {token["content"] for token in added if token["special"]}
    left_out = marked - {*special}
    if not special or not left_out:
        return data, spec, ()
    spec["added_tokens"] = [
        token for token in added if token["content"] not in left_out
    ]
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, dict):
        spec["model"]["vocab"] = {
            token: i for token, i in vocab.items() if token not in left_out
        }
    return json.dumps(spec).encode(), spec, tuple(sorted(left_out))


def _find_byte_ids(spec: dict[str, Any], vocab: dict[str, int]) -> list[int] | None:
    """The id of each byte, if all 256 have one that decodes to it."""
    decoders = _list_step_types(spec["decoder"])
    if "ByteLevel" in decoders:
        tokens = build_byte_alphabet()
    elif "ByteFallback" in decoders and spec["model"].get("byte_fallback"):
        tokens = _FALLBACK
    else:
        return None
    ids = [vocab[token] for token in tokens if token in vocab]
    return ids if len(ids) == 256 else None


def _keeps_text(spec: dict[str, Any]) -> bool:
    """Whether all changes between a text and its bytes' ids can be undone."""
    if spec["normalizer"] is not None:
        return False
    model = spec["model"]
    is_bpe = "merges" in model
    if (
        not is_bpe
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        return False
    if _list_step_types(spec["decoder"]) != {"ByteLevel"}:
        return False
    pre_tokenizers = flatten_tokenizer_component(spec["pre_tokenizer"])
    pre_tokenizer_types = {step["type"] for step in pre_tokenizers}
    if "ByteLevel" not in pre_tokenizer_types:
        return False
    if not pre_tokenizer_types <= {"ByteLevel", "Digits", "Split", "Punctuation"}:
        return False
    for step in pre_tokenizers:
        if step.get("add_prefix_space") or step.get("behavior") == "Removed":
            return False
    for token in spec["added_tokens"]:
        strips_spaces = token["lstrip"] or token["rstrip"]
        if strips_spaces and not token["special"]:
            return False
    return True


def _list_step_types(component: dict[str, Any] | None) -> set[str]:
    return {step["type"] for step in flatten_tokenizer_component(component)}


def _read_steps(
    spec: dict[str, Any], has_all_bytes: bool, tokens: list[str]
) -> EncodingSteps:
    pre_tokenizers = flatten_tokenizer_component(spec["pre_tokenizer"])
    types = {step["type"] for step in pre_tokenizers}
    removes_text = any(step.get("behavior") == "Removed" for step in pre_tokenizers)
    metaspace_splits = any(
        step["type"] == "Metaspace" and step.get("split", True)
        for step in pre_tokenizers
    )
    added = spec.get("added_tokens") or []
    return EncodingSteps(
        normalizers=flatten_tokenizer_component(spec["normalizer"]),
        tokens_are_bytes=_keeps_text(spec),
        pre_tokenizers_keep_text=types <= _SPLITTERS and not removes_text,
        splits_at_spaces=metaspace_splits or not types.isdisjoint(_SPACE_SPLITTERS),
        has_all_bytes=has_all_bytes,
        added_tokens_strip=any(token["lstrip"] or token["rstrip"] for token in added),
        longest_token=max((len(token) for token in tokens), default=1),
    )


def build_byte_alphabet() -> list[str]:
    """Returns the character of each byte in byte-level vocabularies (GPT-2's
    convention).

    Visible Latin-1 characters stand for themselves; the other bytes, in order, for
    U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    next_code_point = 0x100
    alphabet = []
    for byte in range(256):
        if byte in visible:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(next_code_point))
            next_code_point += 1
    return alphabet


def flatten_tokenizer_component(
    component: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer, pre_tokenizer or decoder of tokenizer.json."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    # Its only other entry: "normalizers", "pretokenizers" or "decoders".
    (children,) = (value for key, value in component.items() if key != "type")
    return [step for child in children for step in flatten_tokenizer_component(child)]


class TokenDecoder:
    """Decodes single tokens by a ``tokenizers`` decoder (or None) and its spec."""

    def __init__(
        self,
        decoder: "tokenizers.decoders.Decoder | None",
        decoder_spec: dict[str, Any] | None,
    ):
        self._library = decoder
        types = _check_decoder(decoder_spec)
        self._has_byte_tokens = "ByteFallback" in types
        self._puts_spaces_between = not types or "WordPiece" in types
        alphabet = build_byte_alphabet() if "ByteLevel" in types else []
        self._byte_by_char = {char: byte for byte, char in enumerate(alphabet)}

    def decode(self, token: str, *, first: bool, is_added: bool = False) -> bytes:
        """Returns a token's bytes, at the beginning of a text or within it.
        ``is_added``: the model does not know the token: it is no piece of its alphabet,
        but text."""
        if is_added or self._library is None:
            if self._puts_spaces_between and not first:
                return f" {token}".encode()
            return token.encode()
        if self._byte_by_char:
            if not all(char in self._byte_by_char for char in token):
                return token.encode()
            return bytes(self._byte_by_char[char] for char in token)
        if self._has_byte_tokens:
            # The library would decode a byte that is no character alone as U+FFFD.
            byte_token = _HIGH_BYTE.fullmatch(token)
            if byte_token:
                return bytes([int(byte_token[1], 16)])
        if first:
            return self._library.decode([token]).encode()
        return self._library.decode(["a", token]).removeprefix("a").encode()


def _check_decoder(spec: dict[str, Any] | None) -> set[str]:
    """The kinds of a decoder's steps."""
    steps = flatten_tokenizer_component(spec)
    fused = False  # Whether the library has made one string of all tokens.
    for step in steps:
        match step:
            case {"type": "ByteLevel"} if len(steps) == 1:
                pass
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": old}} if (
                len(old) == 1 or not fused
            ):
                pass
            case {"type": "Strip", "start": 0 | 1 as start, "stop": 0} if (
                fused or start == 0
            ):
                pass
            case {"type": "ByteFallback" | "Metaspace" | "WordPiece"} if not fused:
                pass
            case _:
                raise MaxlmError(
                    f"maxlm cannot decode token by token with the decoder "
                    f"{step['type']}",
                    where="tokenizer.json",
                    fix="use a model whose tokenizer has one of ByteLevel, Metaspace, "
                    "WordPiece or Replace + ByteFallback + Fuse",
                )
    return {step["type"] for step in steps}
