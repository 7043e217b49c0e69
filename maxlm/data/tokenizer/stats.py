"""How well a tokenizer suits a text, and how fast it is."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.interface import Tokenizer

_BATCH_BYTES = 4_194_304


@dataclass(frozen=True)
class TokenizerStats:
    """Counts over a set of texts."""

    documents: int
    bytes: int
    tokens: int
    used_ids: int
    """How many different ids occurred."""
    vocab_size: int
    seconds: float
    """Time spent encoding, not reading."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token stands for, on average: higher means shorter sequences."""
        return self.bytes / self.tokens

    @property
    def vocabulary_use(self) -> float:
        """Share of all ids that occurred."""
        return self.used_ids / self.vocab_size

    @property
    def megabytes_per_second(self) -> float:
        """Encoding speed, 10^6 bytes a second, all threads together."""
        return self.bytes / 1e6 / self.seconds

    def as_dict(self) -> dict[str, float]:
        """Counts and ratios by name."""
        ratios = ("bytes_per_token", "vocabulary_use", "megabytes_per_second")
        return asdict(self) | {name: getattr(self, name) for name in ratios}


def tokenizer_stats(tokenizer: Tokenizer, texts: Iterable[bytes]) -> TokenizerStats:
    """Encode every text and count.

    Raises:
        MaxlmError: there is no text.
    """
    documents = size = tokens = 0
    seconds = 0.0
    used: set[int] = set()
    for batch in _batches(texts):
        start = time.perf_counter()
        encoded = tokenizer.encode_batch(batch)
        seconds += time.perf_counter() - start
        documents += len(batch)
        size += sum(map(len, batch))
        tokens += sum(map(len, encoded))
        used.update(*encoded)
    if tokens == 0:
        raise MaxlmError("no text to measure", fix="give files that are not empty")
    return TokenizerStats(documents, size, tokens, len(used), tokenizer.vocab_size, seconds)


def _batches(texts: Iterable[bytes]) -> Iterable[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
