"""Promise: an output has none of the banned sequences, and every other one may come."""

from itertools import product

import numpy as np

from maxlm.inference.banned_sequences import (
    BannedSequencesMatcher,
    CombinedMatcher,
    fill_draft_masks,
)

VOCAB = 5


def list_allowed(matcher) -> set[int]:
    row = np.zeros(1, np.uint32)
    matcher.fill_mask(row)
    return {token for token in range(VOCAB) if row[0] >> np.uint32(token) & 1}


def list_outputs(matcher, length: int) -> set[tuple[int, ...]]:
    if length == 0:
        return {()}
    outputs = set()
    for token in list_allowed(matcher):
        ahead = matcher.copy()
        assert ahead.accept(token)
        outputs |= {(token, *rest) for rest in list_outputs(ahead, length - 1)}
    return outputs


def test_outputs_are_all_but_those_with_a_banned_sequence():
    banned = ((3,), (0, 1), (1, 1, 2), (2, 0, 0))

    def has_banned(output: tuple[int, ...]) -> bool:
        windows = (
            output[i : i + len(sequence)] == sequence
            for sequence in banned
            for i in range(len(output))
        )
        return any(windows)

    expected = {o for o in product(range(VOCAB), repeat=5) if not has_banned(o)}
    assert list_outputs(BannedSequencesMatcher(banned), 5) == expected
    halves = [BannedSequencesMatcher(banned[:2]), BannedSequencesMatcher(banned[2:])]
    assert list_outputs(CombinedMatcher(halves, ()), 5) == expected


def test_drafts_are_masked_as_far_as_they_may_come():
    matcher = BannedSequencesMatcher(((1, 2),))
    rows = np.zeros((4, 1), np.uint32)
    fill_draft_masks(matcher, rows, [1, 2, 0])
    everything = np.iinfo(np.uint32).max
    assert rows[:, 0].tolist() == [
        everything,
        everything & ~np.uint32(4),
        everything,
        everything,
    ]
    assert list_allowed(matcher) == {0, 1, 2, 3, 4}
