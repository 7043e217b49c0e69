"""Measures how well tokenizers suit a text, and how fast they are."""

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer

ALL_TEXTS = "all"
"""The name of all groups of texts together."""
_BATCH_TEXTS = 256


@dataclass
class _Counts:
    """Counts of some texts by one tokenizer."""

    sums: Counter[str] = field(default_factory=Counter)
    used_ids: set[int] = field(default_factory=set)
    seconds: float = 0.0

    def add(self, tokenizer: Tokenizer, texts: Sequence[bytes]) -> None:
        """Encodes texts and counts."""
        start = time.perf_counter()
        encoded = tokenizer.encode_batch(texts)
        self.seconds += time.perf_counter() - start
        unknown_ids = tokenizer.codec.unknown_ids
        self.sums["documents"] += len(texts)
        for text, ids in zip(texts, encoded, strict=True):
            self.sums["bytes"] += len(text)
            self.sums["words"] += len(text.split())
            self.sums["tokens"] += len(ids)
            self.sums["unknown"] += sum(ids.count(token_id) for token_id in unknown_ids)
            self.used_ids.update(ids)

    def measure(self, vocab_size: int) -> dict[str, float]:
        """Returns the counts and what follows of them; see `measure_tokenizer`."""
        return {
            **self.sums,
            "vocab_size": vocab_size,
            "seconds": self.seconds,
            "used_ids": len(self.used_ids),
            "bytes_per_token": self.sums["bytes"] / self.sums["tokens"],
            "fertility": self.sums["tokens"] / max(self.sums["words"], 1),
            "unknown_share": self.sums["unknown"] / self.sums["tokens"],
            "vocabulary_use": len(self.used_ids) / vocab_size,
            "megabytes_per_second": self.sums["bytes"] / 1e6 / self.seconds,
        }


def measure_tokenizer(tokenizer: Tokenizer, texts: Iterable[bytes]) -> dict[str, float]:
    """Encodes every text and counts.

    Returns:
        The numbers of ``documents``, ``bytes``, ``words`` (stretches without a blank),
        ``tokens`` and ``unknown`` ones (which stand for whatever the vocabulary lacks),
        of different ids that occurred (``used_ids``) and of all (``vocab_size``);
        ``seconds`` of encoding, not reading; ``bytes_per_token``; ``fertility``: tokens
        a word, meaningless for scripts without spaces; ``unknown_share`` of tokens;
        ``vocabulary_use``: the share of ids that occurred; ``megabytes_per_second``:
        10^6 bytes encoded a second, by all threads together.

    Raises:
        MaxlmError: no text.
    """
    grouped = ((ALL_TEXTS, text) for text in texts)
    measures = compare_tokenizers({"tokenizer": tokenizer}, grouped)
    return measures[ALL_TEXTS]["tokenizer"]


def compare_tokenizers(
    tokenizers: Mapping[str, Tokenizer], texts: Iterable[tuple[str, bytes]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Encodes every text by every tokenizer and counts.

    Args:
        texts: each after the name of its group, such as a language.

    Returns:
        What `measure_tokenizer` does, by group, then by tokenizer. The group
        `ALL_TEXTS` comes last; a group without a token is left out.
    """
    # By group, then by tokenizer.
    counts: dict[str, dict[str, _Counts]] = {}
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, _BATCH_TEXTS)):
        if not counts:
            # Not timed: what a library builds at first use is no part of the speed.
            for tokenizer in tokenizers.values():
                tokenizer.encode_batch([text for _, text in batch])
        texts_by_group: dict[str, list[bytes]] = {}
        for group, text in batch:
            texts_by_group.setdefault(group, []).append(text)
        for group, group_texts in texts_by_group.items():
            group_counts = counts.setdefault(group, {})
            for name, tokenizer in tokenizers.items():
                group_counts.setdefault(name, _Counts()).add(tokenizer, group_texts)
    measured_groups = [
        group
        for group in sorted(counts)
        if all(part.sums["tokens"] for part in counts[group].values())
    ]
    if not measured_groups:
        raise MaxlmError("no text to measure", fix="give files that are not empty")
    measures: dict[str, dict[str, dict[str, float]]] = {}
    for group in measured_groups:
        if group != ALL_TEXTS:
            measures[group] = {
                name: counts[group][name].measure(tokenizer.vocab_size)
                for name, tokenizer in tokenizers.items()
            }
    measures[ALL_TEXTS] = {}
    for name, tokenizer in tokenizers.items():
        total = _add_counts(group_counts[name] for group_counts in counts.values())
        measures[ALL_TEXTS][name] = total.measure(tokenizer.vocab_size)
    return measures


def _add_counts(parts: Iterable[_Counts]) -> _Counts:
    total = _Counts()
    for part in parts:
        total.sums.update(part.sums)
        total.used_ids |= part.used_ids
        total.seconds += part.seconds
    return total
