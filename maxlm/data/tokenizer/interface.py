"""What the rest of maxlm may ask of a tokenizer, whichever library stands behind it."""

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """Lossless text <-> ids.

    Two promises hold for every text, of any bytes: ``decode_bytes(encode(text))`` is the text, and
    no id in ``special_tokens`` is among ``encode(text)`` unless ``allow_special`` was set.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: ids lie in [0, vocab_size)."""
        ...

    @property
    def bos_id(self) -> int:
        """The id that opens a document; may equal ``eos_id``."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that closes a document."""
        ...

    @property
    def pad_id(self) -> int | None:
        """The padding id, if the tokenizer has one."""
        ...

    @property
    def special_tokens(self) -> dict[str, int]:
        """Every special token's literal and id, in order of id."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of all that decides which ids a text gets; unchanged by save and load."""
        ...

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        """The ids of one text. No bos or eos is added.

        Bytes need not be valid UTF-8, and a lone surrogate in a str stands for its three bytes.

        Args:
            text: what to encode.
            allow_special: True turns each literal of a special token into its id: for templates
                and prompts that we wrote ourselves. False encodes those literals as the ordinary
                text they are: for anything a user or a corpus supplied.
        """
        ...

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """``encode`` of each text, all the library's threads at work.

        Ids come as lists because both libraries hand out lists: an array would cost a second copy.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens as their literals, bytes that are not UTF-8 as U+FFFD.

        Raises:
            MaxlmError: an id outside [0, vocab_size).
        """
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids; special tokens as their literals.

        Raises:
            MaxlmError: an id outside [0, vocab_size).
        """
        ...

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the tokenizer into ``folder``, made if need be; ``load_tokenizer`` reads it back.

        Raises:
            MaxlmError: the folder cannot be written.
        """
        ...
