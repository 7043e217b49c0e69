"""Measures how well a tokenizer suits a text, and how fast it is."""

import itertools
import time
from collections import Counter
from collections.abc import Iterable

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.codec import Tokenizer

_BATCH_TEXTS = 256


def measure_tokenizer(tokenizer: Tokenizer, texts: Iterable[bytes]) -> dict[str, float]:
    """Encodes every text and counts.

    Returns:
        The numbers of ``documents``, ``bytes``, ``words`` (stretches without a blank), ``tokens``
        and ``unknown`` ones (which stand for whatever the vocabulary lacks), of different ids that
        occurred (``used_ids``) and of all (``vocab_size``); ``seconds`` of encoding, not reading;
        ``bytes_per_token``; ``fertility``: tokens a word, meaningless for scripts without spaces;
        ``unknown_share`` of tokens; ``vocabulary_use``: the share of ids that occurred;
        ``megabytes_per_second``: 10^6 bytes encoded a second, by all threads together.
    """
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
    return {
        **counts,
        "vocab_size": tokenizer.vocab_size,
        "seconds": seconds,
        "used_ids": len(used),
        "bytes_per_token": counts["bytes"] / counts["tokens"],
        "fertility": counts["tokens"] / max(counts["words"], 1),
        "unknown_share": counts["unknown"] / counts["tokens"],
        "vocabulary_use": len(used) / tokenizer.vocab_size,
        "megabytes_per_second": counts["bytes"] / 1e6 / seconds,
    }
