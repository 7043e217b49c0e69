"""Packed rows of ragged sequences with made log-probabilities, and the sequences one by
one in float64."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

ROWS, LENGTH, SEGMENTS = 3, 23, 3
# Entries of each row's sequences; a row ends in padding, and has fewer sequences than
# there is room for, or none.
LAYOUT = ((9, 6, 5), (12, 1), ())


class PolicySequence(NamedTuple):
    """Entries that count of one sequence, float64 [n], by the names of rows' arrays."""

    place: tuple[int, int]
    """Row, and number of the segment from 0."""
    entries: np.ndarray
    """Their places in the row."""
    arrays: dict[str, np.ndarray]


def draw_policy_rows(seed: int = 0, spread: float = 0.4) -> dict[str, np.ndarray]:
    """Arrays [3, 23] as a policy's loss reads them, and made log-probabilities
    ``log_probs``; where nothing counts, arrays hold what no one may read."""
    random = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    segment_ids = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    advantages = np.zeros(shape, np.float32)
    for row, lengths in enumerate(LAYOUT):
        start = 0
        for number, length in enumerate(lengths):
            part = slice(start, start + length)
            segment_ids[row, part] = number + 1
            positions[row, part] = np.arange(length)
            prompt = length // 3
            weights[row, start + prompt : start + length] = 1
            if length > 7:  # an environment's token amid the policy's
                weights[row, start + prompt + 2] = 0
            advantages[row, part] = random.normal()
            start += length
    log_probs = -random.gamma(2.0, 0.7, shape).astype(np.float32)

    def near(scale: float) -> np.ndarray:
        return (log_probs + scale * random.standard_normal(shape)).astype(np.float32)

    arrays = {
        "log_probs": log_probs,
        "old_log_probs": near(spread),
        "sampled_log_probs": near(spread),
        "reference_log_probs": near(1.0),
        "entropies": random.gamma(2.0, 0.5, shape).astype(np.float32),
    }
    arrays = {name: np.where(weights, x, 77.0) for name, x in arrays.items()}
    return {
        **{name: x.astype(np.float32) for name, x in arrays.items()},
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "segment_ids": segment_ids,
        "positions": positions,
        "weights": weights,
        "advantages": advantages,
    }


def split_sequences(arrays: dict[str, Any]) -> Iterator[PolicySequence]:
    """Yields the sequences of rows one by one."""
    for row in range(ROWS):
        for number in range(SEGMENTS):
            is_member = arrays["segment_ids"][row] == number + 1
            if not is_member.any():
                continue
            is_counted = is_member & (arrays["weights"][row] > 0)
            entries = np.flatnonzero(is_counted)
            values = {
                name: np.asarray(x[row], np.float64)[entries]
                for name, x in arrays.items()
            }
            yield PolicySequence((row, number), entries, values)
