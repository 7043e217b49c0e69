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
from typing import Any, NamedTuple

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Codec
from maxlm.data.tokenizer.files import JSON_FILE

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
        self._known, known, self.left_out = _known(data, self._special)
        self._library = _open(self._known, self._special)
        self._library.encode_special_tokens = True
        spec = {"normalizer": None, "pre_tokenizer": None, "decoder": None, **known}
        self.has_post_processor = spec.get("post_processor") is not None
        vocab = self._library.get_vocab(with_added_tokens=False)
        added = self._library.get_added_tokens_decoder()
        size = max(self.get_vocab().values(), default=-1) + 1
        # Of ids between them that are no tokens the empty one.
        tokens = [self._library.id_to_token(i) or "" for i in range(size)]
        self._decoder = TokenDecoder(self._library.decoder, spec["decoder"])
        self._tokens = [
            (t, i in added and vocab.get(t) != i) for i, t in enumerate(tokens)
        ]
        self.token_bytes = [self._bytes_of(i, first=False) for i in range(len(tokens))]
        byte_ids = _byte_ids(spec, vocab)
        self.lossless = byte_ids is not None and _keeps_text(spec)
        self.steps = _read_steps(spec, byte_ids is not None, tokens)
        self.byte_ids = byte_ids if self.lossless else None
        ids = [self._library.token_to_id(literal) for literal in self._special]
        self._special_ids = frozenset(i for i in ids if i is not None)
        # The bytes of characters outside the vocabulary, if the model has them.
        names = _FALLBACK if spec["model"].get("byte_fallback") else ()
        fallback = frozenset(vocab[name] for name in names if name in vocab)
        self._pieces_to_avoid = self._special_ids - fallback
        pieces = (i for i in self._pieces_to_avoid if vocab.get(tokens[i]) == i)
        self._respelled = {i: self._respell(tokens[i]) for i in pieces}
        unknown = spec["model"].get("unk_id"), vocab.get(spec["model"].get("unk_token"))
        self.unknown_ids = frozenset(
            i for i in unknown if i is not None and not byte_ids
        )
        found = self.unknown_ids.union(fallback, *self._respelled.values())
        self.ordinary_special_ids = self._special_ids & found
        self._forbidden = self._special_ids - found

    @property
    def known_data(self) -> bytes:
        """The tokenizer.json without the special tokens that are unknown here."""
        return self._known

    def __reduce__(self):
        is_own = self.cut_pattern is PATTERN_CUT
        return partial(HuggingFaceCodec, splits_by_pattern=is_own), (
            self.data,
            self._special,
        )

    def encode_segments(self, segments: list[str]) -> list[list[int]]:
        return [self._without_special(ids) for ids in _encode(self._library, segments)]

    def encode_segments_with_special(
        self, segments: list[str], escape_char: str | None = None
    ) -> list[list[int]]:
        if escape_char is None:
            return _encode(self._marked, segments)
        return [self._encode_disarmed(segment, escape_char) for segment in segments]

    def _encode_disarmed(self, segment: str, mark: str) -> list[int]:
        # The library sees the mark, so that no literal which contains it is one; its
        # own ids go.
        encoding = self._marked.encode(segment, add_special_tokens=False)
        ids: list[int] = []
        for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            span = segment[start:stop]
            if span != mark:
                ids += self._without_special([i]) if mark in span else [i]
        return ids

    def _without_special(self, ids: list[int]) -> list[int]:
        # The library looks for no special token, but the model may have one as a piece.
        if self._forbidden.isdisjoint(ids):
            return ids
        parts = (self._respelled[i] if i in self._forbidden else (i,) for i in ids)
        return [i for part in parts for i in part]

    def bytes_at_text_start(self, token_id: int) -> bytes:
        return self._bytes_of(token_id, first=True)

    def fingerprint_input(self) -> bytes:
        spec = {"normalizer": None, "pre_tokenizer": None, **json.loads(self._known)}
        parts = ("normalizer", "pre_tokenizer", "model", "added_tokens")
        return json.dumps({part: spec[part] for part in parts}, sort_keys=True).encode()

    @property
    def special_tokens(self) -> dict[str, int]:
        """Tokens that are marked as special, in the file or by ``special``, in order of
        id."""
        added = self._library.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    def get_vocab(self) -> dict[str, int]:
        """Every token's id."""
        return self._library.get_vocab(with_added_tokens=True)

    def get_prefix_and_suffix(self) -> tuple[list[str], list[str]]:
        """The tokens that the library puts before and after a text when asked for
        special ones."""
        encoding = self._marked.encode("a")
        ordinary = [
            i for i, mark in enumerate(encoding.special_tokens_mask) if not mark
        ]
        if not ordinary:
            return [], []
        return encoding.tokens[: ordinary[0]], encoding.tokens[ordinary[-1] + 1 :]

    @cached_property
    def _marked(self):
        """The library with eyes for special tokens: it has one switch for all
        threads."""
        return _open(self._known, self._special)

    def _bytes_of(self, i: int, *, first: bool) -> bytes:
        token, is_added = self._tokens[i]
        return (
            self._decoder.decode(token, first=first, is_added=is_added)
            if token
            else b""
        )

    def _respell(self, token: str) -> list[int]:
        """Ids of a piece's characters without special ones, as far as the vocabulary
        has them."""
        ids = [piece.id for piece in self._library.model.tokenize(token)]
        if len(token) < 2 or self._pieces_to_avoid.isdisjoint(ids):
            return ids
        return self._respell(token[:1]) + self._respell(token[1:])


def _encode(library: Any, segments: list[str]) -> list[list[int]]:
    # The batch call starts a thread pool, which a later fork would then have to do
    # without.
    if len(segments) == 1:
        return [library.encode(segments[0], add_special_tokens=False).ids]
    return [
        each.ids
        for each in library.encode_batch_fast(segments, add_special_tokens=False)
    ]


def _open(data: bytes, special: Iterable[str]):
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
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    marked = []
    for literal in special:
        old = added.get(literal)
        given = {name: getattr(old, name, False) for name in flags}
        if old is None or not old.special:
            marked.append(AddedToken(literal, special=True, **given))
    tokenizer.add_special_tokens(marked)
    return tokenizer


def _known(
    data: bytes, special: tuple[str, ...]
) -> tuple[bytes, dict[str, Any], tuple[str, ...]]:
    """A file without the tokens that it marks as special and ``special`` lacks, what is
    in it, and these tokens."""
    spec = json.loads(data)
    added = spec.get("added_tokens") or []
    lost = {token["content"] for token in added if token["special"]} - {*special}
    if not special or not lost:
        return data, spec, ()
    spec["added_tokens"] = [token for token in added if token["content"] not in lost]
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, dict):
        spec["model"]["vocab"] = {
            token: i for token, i in vocab.items() if token not in lost
        }
    return json.dumps(spec).encode(), spec, tuple(sorted(lost))


def _byte_ids(spec: dict[str, Any], vocab: dict[str, int]) -> list[int] | None:
    """The id of each byte, if all 256 have one that decodes to it."""
    kinds = {part["type"] for part in flatten_tokenizer_component(spec["decoder"])}
    if "ByteLevel" in kinds:
        names = build_byte_alphabet()
    elif "ByteFallback" in kinds and spec["model"].get("byte_fallback"):
        names = _FALLBACK
    else:
        return None
    ids = [vocab[name] for name in names if name in vocab]
    return ids if len(ids) == 256 else None


def _keeps_text(spec: dict[str, Any]) -> bool:
    """Whether all changes between a text and its bytes' ids can be undone."""
    model = spec["model"]
    pre = flatten_tokenizer_component(spec["pre_tokenizer"])
    known = {"ByteLevel", "Digits", "Split", "Punctuation"}
    return (
        spec["normalizer"] is None
        and {part["type"] for part in flatten_tokenizer_component(spec["decoder"])}
        == {"ByteLevel"}
        and "merges" in model
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and any(part["type"] == "ByteLevel" for part in pre)
        and not any(part.get("add_prefix_space") for part in pre)
        and all(
            part["type"] in known and part.get("behavior") != "Removed" for part in pre
        )
        and not any(
            (token["lstrip"] or token["rstrip"]) and not token["special"]
            for token in spec["added_tokens"]
        )
    )


def _read_steps(
    spec: dict[str, Any], has_all_bytes: bool, tokens: list[str]
) -> EncodingSteps:
    splitters = flatten_tokenizer_component(spec["pre_tokenizer"])
    removing = [part for part in splitters if part.get("behavior") == "Removed"]
    kinds = {part["type"] for part in splitters}
    splits_words = any(
        part["type"] == "Metaspace" and part.get("split", True) for part in splitters
    )
    added = spec.get("added_tokens") or []
    return EncodingSteps(
        normalizers=flatten_tokenizer_component(spec["normalizer"]),
        tokens_are_bytes=_keeps_text(spec),
        pre_tokenizers_keep_text=kinds <= _SPLITTERS and not removing,
        splits_at_spaces=splits_words or not kinds.isdisjoint(_SPACE_SPLITTERS),
        has_all_bytes=has_all_bytes,
        added_tokens_strip=any(token["lstrip"] or token["rstrip"] for token in added),
        longest_token=max(map(len, tokens), default=1),
    )


def build_byte_alphabet() -> list[str]:
    """Returns the character of each byte in byte-level vocabularies (GPT-2's
    convention).

    Visible Latin-1 characters stand for themselves; the other bytes, in order, for
    U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def flatten_tokenizer_component(
    component: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer, pre_tokenizer or decoder of tokenizer.json."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    (children,) = (value for key, value in component.items() if key != "type")
    return [step for child in children for step in flatten_tokenizer_component(child)]


class TokenDecoder:
    """Decodes single tokens by a ``tokenizers`` decoder (or None) and its spec."""

    def __init__(self, decoder: Any, decoder_spec: dict[str, Any] | None):
        self._library = decoder
        kinds = _check_decoder(decoder_spec)
        self._bytes = "ByteFallback" in kinds
        self._spaced = not kinds or "WordPiece" in kinds
        alphabet = build_byte_alphabet() if "ByteLevel" in kinds else []
        self._byte_of_char = {char: byte for byte, char in enumerate(alphabet)}

    def decode(self, token: str, *, first: bool, is_added: bool = False) -> bytes:
        """Returns a token's bytes, at the beginning of a text or within it.
        ``is_added``: the model does not know the token: it is no piece of its alphabet,
        but text."""
        if is_added or self._library is None:
            return (f" {token}" if self._spaced and not first else token).encode()
        if self._byte_of_char:
            known = all(char in self._byte_of_char for char in token)
            return (
                bytes(self._byte_of_char[char] for char in token)
                if known
                else token.encode()
            )
        if self._bytes and (found := _HIGH_BYTE.fullmatch(token)):
            return bytes([int(found[1], 16)])
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
                    "WordPiece "
                    "or Replace + ByteFallback + Fuse",
                )
    return {step["type"] for step in steps}
