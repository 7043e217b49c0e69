"""Promise: whatever batches a run skips, it knows which rollout comes before another,
and which record it goes on from."""

import pytest

from maxlm.checkpoint.skips import Skips, contiguous_ranges
from maxlm.rl.rollouts.history import RolloutHistory

NUM_STEPS = 30


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize(
    "skips", [(), ((0, 2),), ((4, 8), (9, 11)), ((7, 8), (15, 20)), ((3, 5), (0, 8))]
)
def test_history_is_that_of_the_batches_that_are_trained_on(updates: int, skips: Skips):
    history = RolloutHistory(updates, skips)
    ranges = contiguous_ranges(0, NUM_STEPS, skips)
    batches = [
        batch for first, count in ranges for batch in range(first, first + count)
    ]
    for step, batch in enumerate(batches):
        number, num_trained = divmod(batch, updates)
        trained = {earlier // updates for earlier in batches[:step]}
        expected = max(trained, default=None)
        assert history.find_needed_record(step) == expected
        if num_trained:
            continue
        assert history.find_previous(number) == expected
        skipped = set(range(number)) - trained
        since = {other for other in skipped if expected is None or other > expected}
        assert history.count_skipped_before(number) == len(since)
        begin = 0 if expected is None else expected * updates
        is_whole = [*range(begin, batch)] == [b for b in batches if begin <= b < batch]
        assert history.is_after_skips(number) == (not is_whole)
