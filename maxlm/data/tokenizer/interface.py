"""What the rest of maxlm may ask of a tokenizer, whichever library stands behind it."""

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> ids.

    Two promises hold for every text, of any bytes: ``decode_bytes(encode(text))`` is the text, and
    no id in ``special_tokens`` is among ``encode(text)`` unless ``allow_special`` was set. The
    first one is ``lossless``: every tokenizer that maxlm trained keeps it, one imported from
    Hugging Face only if its own rules do (``HuggingFaceModel`` says what each sort returns).
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: ids lie in [0, vocab_size)."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether every text comes back. False: a normaliser may have changed it for good."""
        ...

    @property
    def bos_id(self) -> int:
        """The id that opens a document; may equal ``eos_id``."""
        ...

    @property
    def opening(self) -> tuple[int, ...]:
        """What to put before a document or a prompt: ``(bos_id,)``, or nothing for an imported
        tokenizer that does not do so itself (GPT-2, Qwen, SmolLM2)."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that closes a document."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a continuation: ``eos_id``, and what an imported checkpoint names
        besides, such as the end of a turn."""
        ...

    @property
    def pad_id(self) -> int | None:
        """The padding id, if the tokenizer has one."""
        ...

    @property
    def special_tokens(self) -> dict[str, int]:
        """Every special token's literal and id, in order of id.

        Not those that an imported tokenizer gives to ordinary text: the unknown character's, those
        of bytes, and any that is a single character.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of all that decides which ids a text gets; unchanged by save and load."""
        ...

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        """The ids of one text. No bos or eos is added.

        Bytes need not be valid UTF-8, and a lone surrogate in a str stands for its three bytes.
        An imported tokenizer may have no ids for stray bytes: it reads U+FFFD instead.

        Args:
            text: what to encode.
            allow_special: True turns each literal of a special token into its id: for templates
                and prompts that we wrote ourselves. False encodes those literals as the ordinary
                text they are: for anything a user or a corpus supplied.
        """
        ...

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """``encode`` of each text, all the library's threads at work.

        Ids come as lists because the libraries hand out lists: an array would cost a second copy.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens as their literals, bytes that are not UTF-8 as U+FFFD.

        Raises:
            MaxlmError: an id outside [0, vocab_size).
        """
        ...

    def decode_bytes(self, ids: Iterable[int], *, continued: bool = False) -> bytes:
        """The exact bytes of ids; special tokens as their literals.

        Args:
            continued: the ids go on after others. It matters to imported tokenizers that put a
                space before a text and take it away again: it is the text's, if in the midst.

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
