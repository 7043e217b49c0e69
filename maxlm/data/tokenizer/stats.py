"""Measures how well tokenizers suit a text, and how fast they are."""

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer

ALL = "all"
"""The name of all groups together."""

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

    def __add__(self, other: "TokenizerStats") -> "TokenizerStats":
        """Add the counts of another set of texts, by the same tokenizer."""
        sums = ("documents", "bytes", "words", "tokens", "unknown", "seconds")
        counts = {name: getattr(self, name) + getattr(other, name) for name in sums}
        return replace(self, used=self.used | other.used, **counts)

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
    return compare_tokenizers({"": tokenizer}, ((ALL, text) for text in texts))[ALL][""]


def compare_tokenizers(
    tokenizers: Mapping[str, Tokenizer], texts: Iterable[tuple[str, bytes]]
) -> dict[str, dict[str, TokenizerStats]]:
    """Encode every text by every tokenizer and count: by group of texts, then by tokenizer.

    Texts come with the name of a group, such as a language. The group ``ALL`` comes last.
    """
    found: dict[str, dict[str, TokenizerStats]] = {}
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _BATCH_TEXTS)):
        groups: dict[str, list[bytes]] = {}
        for group, text in batch:
            groups.setdefault(group, []).append(text)
        is_first = not found
        for name, tokenizer in tokenizers.items():
            if is_first:  # What is built at first use takes no part.
                tokenizer.encode_batch([text for _, text in batch])
            for group, members in groups.items():
                counts = _count(tokenizer, members)
                for each in {group, ALL}:
                    of_group = found.setdefault(each, {})
                    of_group[name] = of_group[name] + counts if name in of_group else counts
    found = {
        group: found[group]
        for group in sorted(found, key=lambda group: (group == ALL, group))
        if all(counts.tokens for counts in found[group].values())
    }
    if not found:
        raise MaxlmError("no text to measure", fix="give files that are not empty")
    return found


def _count(tokenizer: Tokenizer, texts: list[bytes]) -> TokenizerStats:
    start = time.perf_counter()
    encoded = tokenizer.encode_batch(texts)
    seconds = time.perf_counter() - start
    return TokenizerStats(
        documents=len(texts),
        bytes=sum(map(len, texts)),
        words=sum(len(text.split()) for text in texts),
        tokens=sum(map(len, encoded)),
        unknown=sum(ids.count(i) for ids in encoded for i in tokenizer.codec.unknown_ids),
        used=frozenset().union(*encoded),
        vocab_size=tokenizer.vocab_size,
        seconds=seconds,
    )
