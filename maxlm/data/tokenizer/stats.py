"""Measures how well a tokenizer suits a text, and how fast it is."""

import itertools
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer

_BATCH_TEXTS = 256


@dataclass(frozen=True)
class TokenizerStats:
    """Counts over a set of texts."""

    documents: int
    bytes: int
    words: int
    """Stretches without a blank."""
    tokens: int
    unknown: int
    """Tokens that stand for whatever the vocabulary lacks."""
    used: frozenset[int]
    """The different ids that occurred."""
    vocab_size: int
    seconds: float
    """Time spent encoding, not reading."""

    @property
    def used_ids(self) -> int:
        """Number of different ids that occurred."""
        return len(self.used)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token stands for, on average: higher means shorter sequences."""
        return self.bytes / self.tokens

    @property
    def fertility(self) -> float:
        """Tokens a word, on average; meaningless for scripts without spaces."""
        return self.tokens / max(self.words, 1)

    @property
    def unknown_share(self) -> float:
        """Share of all tokens that are unknown, and so say nothing of the text."""
        return self.unknown / self.tokens

    @property
    def vocabulary_use(self) -> float:
        """Share of all ids that occurred."""
        return self.used_ids / self.vocab_size

    @property
    def megabytes_per_second(self) -> float:
        """Encoding speed, 10^6 bytes a second, all threads together."""
        return self.bytes / 1e6 / self.seconds

    def as_dict(self) -> dict[str, float]:
        """Returns counts and ratios by name."""
        counts = {name: value for name, value in vars(self).items() if name != "used"}
        ratios = (name for name, kind in vars(type(self)).items() if isinstance(kind, property))
        return counts | {name: getattr(self, name) for name in ratios}


def measure_tokenizer(tokenizer: Tokenizer, texts: Iterable[bytes]) -> TokenizerStats:
    """Encode every text and count."""
    counts: Counter[str] = Counter()
    used: set[int] = set()
    seconds, texts = 0.0, iter(texts)
    while batch := list(itertools.islice(texts, _BATCH_TEXTS)):
        if not counts:  # What is built at first use takes no part.
            tokenizer.encode_batch(batch)
        start = time.perf_counter()
        encoded = tokenizer.encode_batch(batch)
        seconds += time.perf_counter() - start
        unknown = tokenizer.codec.unknown_ids
        counts["documents"] += len(batch)
        counts["bytes"] += sum(map(len, batch))
        counts["words"] += sum(len(text.split()) for text in batch)
        counts["tokens"] += sum(map(len, encoded))
        counts["unknown"] += sum(ids.count(i) for ids in encoded for i in unknown)
        used.update(*encoded)
    if not counts["tokens"]:
        raise MaxlmError("no text to measure", fix="give files that are not empty")
    size = tokenizer.vocab_size
    return TokenizerStats(**counts, used=frozenset(used), vocab_size=size, seconds=seconds)
