"""SentencePiece BPE and Unigram models (Kudo & Richardson, 2018; Kudo, 2018), with byte
fallback.

SentencePiece writes U+2581 for a space inside its pieces. With the identity normaliser,
no added prefix and no collapsing of spaces, that one character is all it would not give
back, so `encode` keeps U+2581 from it and spells it in byte tokens.
"""

import io
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Codec, cut_text
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.files import SENTENCEPIECE_FILE
from maxlm.runtime.pool import tokenizer_thread_count

_SPACE = "\u2581"
_UNKNOWN = "<unk>"
# The trainer takes 4192 bytes of a sentence at most, and a character has up to four.
_SENTENCE_CHARS = 1000
# Sums are taken per thread, so the number of threads is part of what makes training
# repeatable.
_TRAINING_THREADS = 16
# What the trainer skips a sentence for (NUL, U+2585), mistakes for its own mark
# (U+2581), or would find already taken if it were learned as a piece.
_UNLEARNABLE = re.compile(f"[\0\u2585{_SPACE}]|<unk>|<0x[0-9A-F]{{2}}>")

# What a model must give back to be lossless: spaces are kept and none is added, nothing
# is normalised, and rare characters fall back to bytes.
_PROBES = (
    "a",
    " a",
    "a ",
    "a  b",
    "\t\n",
    "e\u0301é",
    "ﬁ Ａ",
    "\u3000\u00a0",
    "\U0010ffff☃",
)


PieceKind = Literal["normal", "unknown", "control", "unused", "byte"]


class Piece(NamedTuple):
    """A token of a model, as its file has it."""

    text: str
    score: float
    """What BPE joins by: the highest first."""
    kind: PieceKind


class SentencePieceCodec(Codec):
    """A trained tokenizer.model as a ``Codec``.

    Lossless if it changes no text and has every byte, as those that maxlm trains.
    Others (T5, Llama 2, XLM-R) get whole texts as they are, so that their ids are the
    library's own.
    """

    file_name = SENTENCEPIECE_FILE
    reserved_chars = _SPACE
    # A piece holds spaces only at its start, so none straddles the place before a
    # word's space. Unigram's float32 running score rounds less in a short segment than
    # in a whole document.
    cut_pattern = re.compile(r"[!-~](?= )")

    def __init__(self, data: bytes):
        from sentencepiece import SentencePieceProcessor

        self.data = data
        self._model = SentencePieceProcessor()
        # Not by the constructor, which takes an empty model for none and says nothing.
        self._model.load_from_serialized_proto(data)  # pyright: ignore[reportAttributeAccessIssue]
        self.token_bytes = [
            self._bytes_of(i) for i in range(self._model.get_piece_size())
        ]
        self.byte_ids = [
            self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)
        ]
        self.lossless = self._is_exact(self.byte_ids)
        if not self.lossless:
            self.byte_ids = None
            self.reserved_chars = ""
            self.cut_pattern = re.compile(r"(?!)")  # never
            unknown_id = self._model.unk_id()
            self.unknown_ids = frozenset([unknown_id])
            # As the library decodes it.
            self.token_bytes[unknown_id] = " ⁇ ".encode()

    def __reduce__(self):
        return SentencePieceCodec, (self.data,)

    def encode_segments(self, segments: list[str]) -> list[list[int]]:
        threads = 1 if len(segments) == 1 else tokenizer_thread_count()
        return self._model.encode(segments, out_type=int, num_threads=threads)

    def fingerprint_input(self) -> bytes:
        return self.data

    def bytes_at_text_start(self, token_id: int) -> bytes:
        is_byte = self._model.is_byte(token_id)
        if self.lossless or is_byte or self._model.is_control(token_id):
            return self.token_bytes[token_id]
        # Without the space that it put before the text.
        return self._model.decode([token_id]).encode()

    def control_tokens(self) -> dict[str, int]:
        """Control tokens, which no text gives, by id."""
        ids = range(self._model.get_piece_size())
        return {self._model.id_to_piece(i): i for i in ids if self._model.is_control(i)}

    def find_special_piece(self, name: str) -> str | None:
        """The piece that the model itself calls bos, eos or pad, if it has one."""
        i: int = getattr(self._model, f"{name}_id")()
        return self._model.id_to_piece(i) if i >= 0 else None

    def is_unigram(self) -> bool:
        """Whether pieces have probabilities; BPE's have ranks."""
        scores = map(self._model.get_score, range(self._model.get_piece_size()))
        return any(score != int(score) for score in scores)

    def list_pieces(self) -> list[Piece]:
        """Lists every token, in order of id."""
        model = self._model
        pieces: list[Piece] = []
        for i in range(model.get_piece_size()):
            kind: PieceKind = "normal"
            if model.is_unknown(i):
                kind = "unknown"
            elif model.is_control(i):
                kind = "control"
            elif model.is_unused(i):
                kind = "unused"
            elif model.is_byte(i):
                kind = "byte"
            pieces.append(Piece(model.id_to_piece(i), model.get_score(i), kind))
        return pieces

    @property
    def adds_space_prefix(self) -> bool:
        """Whether the model puts a space before a text."""
        pieces = self._model.encode("a", out_type=str)
        return "".join(pieces).startswith(_SPACE)

    def _bytes_of(self, i: int) -> bytes:
        piece: str = self._model.id_to_piece(i)
        if self._model.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(i):
            # The library insists on this id; with byte fallback it is unused.
            return "\ufffd".encode()
        if self._model.is_control(i):
            return piece.encode()
        return piece.replace(_SPACE, " ").encode()

    def _is_exact(self, byte_ids: list[int]) -> bool:
        """Whether every byte has an id, and every probe comes back as it was."""
        for byte, byte_id in enumerate(byte_ids):
            if self.token_bytes[byte_id] != bytes([byte]):
                return False
        encoded = self.encode_segments(list(_PROBES))
        for text, ids in zip(_PROBES, encoded, strict=True):
            decoded = b"".join(self.token_bytes[i] for i in ids)
            if decoded != text.encode():
                return False
        return True


def train_sentencepiece(
    config: TokenizerConfig, segments: Iterator[str]
) -> tuple[bytes, dict[str, int]]:
    """Returns the tokenizer.model learned from ``segments``, and the special tokens'
    ids, from 1.

    All the text is held in memory.
    """
    from sentencepiece import SentencePieceTrainer

    literals = config.special_literals
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=_sentences(segments),
            model_writer=model,
            model_type=config.kind.removeprefix("sentencepiece_"),
            vocab_size=config.vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            unk_piece=_UNKNOWN,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=list(literals),
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _translate(error, config) from error
    return model.getvalue(), {literal: 1 + i for i, literal in enumerate(literals)}


def _sentences(segments: Iterator[str]) -> Iterator[str]:
    """Yields text that the trainer takes, cut before a word's space where it can be."""
    for segment in segments:
        for part in _UNLEARNABLE.split(segment):
            pieces = cut_text(
                part, _SENTENCE_CHARS // 2, SentencePieceCodec.cut_pattern
            )
            for piece in pieces:
                for start in range(0, len(piece), _SENTENCE_CHARS):
                    yield piece[start : start + _SENTENCE_CHARS]


def _translate(error: RuntimeError, config: TokenizerConfig) -> MaxlmError:
    text = str(error)
    largest = re.search(r"Please set it to a value <= (\d+)", text)
    if largest:
        return make_small_text_error(config, int(largest[1]))
    smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", text)
    if smallest:
        message = f"vocab_size={config.vocab_size} is too small for the characters of the text"
        return MaxlmError(message, fix=f"set vocab_size to {smallest[1]} or more")
    message = f"SentencePiece could not train on this text: {text.strip()}"
    return MaxlmError(message, fix="give more text or another vocab_size")


def make_small_text_error(config: TokenizerConfig, max_size: int) -> MaxlmError:
    """Makes the error for a text that yields too few tokens."""
    message = (
        f"the text is too small for vocab_size={config.vocab_size}: it yields "
        f"{max_size} tokens"
    )
    fix = f"give more text or set vocab_size to {max_size} or less"
    return MaxlmError(message, fix=fix)
