"""Promise: rows hold every sample's tokens, each drawn one with its weight,
log-probability and advantage, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.rl.rollouts.packing import (
    RowLayout,
    count_cut_samples,
    pack_samples,
    spread_over_sequences,
)
from maxlm.rl.samples import Prompt, Sample
from tests.errors import message


def make_sample(number: int, prompt: list[int], drawn: list[tuple[int, bool]]):
    tokens = [*prompt, *(token for token, _ in drawn)]
    is_sampled = [False] * len(prompt) + [is_drawn for _, is_drawn in drawn]
    return Sample(
        Prompt(number // 2, tuple(prompt), {}),
        number % 2,
        tokens=tokens,
        is_sampled=is_sampled,
        log_probs=[
            -0.25 * place if is_drawn else 0
            for place, is_drawn in enumerate(is_sampled)
        ],
        versions=[7 if is_drawn else -1 for is_drawn in is_sampled],
        is_complete=True,
    )


token = st.integers(1, 99)
SAMPLES = st.lists(
    st.tuples(
        st.lists(token, min_size=1, max_size=4),
        st.lists(st.tuples(token, st.booleans()), max_size=5),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=50)
@given(SAMPLES, st.integers(1, 3), st.integers(0, 2), st.data())
def test_rows_hold_every_sample(parts, sequences_per_row, num_spare_rows, data):
    samples = [make_sample(i, *part) for i, part in enumerate(parts)]
    numbers = st.lists(
        st.floats(-3, 3, width=32), min_size=len(samples), max_size=len(samples)
    )
    advantages = data.draw(numbers)
    counts = data.draw(
        st.lists(st.booleans(), min_size=len(samples), max_size=len(samples))
    )
    layout = RowLayout(8 * sequences_per_row + 1, sequences_per_row)
    num_rows = layout.count_rows(len(samples)) + num_spare_rows
    batch = pack_samples(samples, advantages, layout, num_rows=num_rows, counts=counts)
    assert all(array.shape == (num_rows, layout.seq_len) for array in batch.values())
    # Read back by segments, a sequence after the other.
    sequences = []
    for row in range(num_rows):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            inside = np.flatnonzero(segments == segment)
            if inside.size:
                sequences.append({name: a[row, inside] for name, a in batch.items()})
        padding = segments == 0
        for name, array in batch.items():
            assert (array[row, padding] == (-1 if name == "versions" else 0)).all()
    # A sample of one token has no target.
    longer = [i for i, sample in enumerate(samples) if len(sample.tokens) > 1]
    assert len(sequences) == len(longer)
    for i, sequence in zip(longer, sequences, strict=True):
        sample = samples[i]
        drawn = np.array(sample.is_sampled[1:], np.float32)
        assert sequence["tokens"].tolist() == sample.tokens[:-1]
        assert sequence["targets"].tolist() == sample.tokens[1:]
        assert sequence["positions"].tolist() == [*range(len(sample.tokens) - 1)]
        assert sequence["weights"].tolist() == (drawn * counts[i]).tolist()
        assert sequence["sampled_log_probs"].tolist() == sample.log_probs[1:]
        assert sequence["versions"].tolist() == sample.versions[1:]
        expected = (drawn * np.float32(advantages[i])).tolist()
        assert sequence["advantages"].tolist() == expected
    # Spread later, the same.
    spread = spread_over_sequences(
        np.array(advantages), batch["segment_ids"], sequences_per_row
    )
    drawn = batch["versions"] >= 0
    np.testing.assert_array_equal(spread * drawn, batch["advantages"])


def test_long_samples():
    samples = [
        make_sample(i, [1, 2], [(5, True)] * size) for i, size in enumerate((3, 9))
    ]
    layout = RowLayout(14, 2)
    error = message(pack_samples, samples, [0.0, 1.0], layout)
    assert "sample 1 of row 0 has 11 tokens" in error
    assert "data.seq_len=14 has room for 2 of 8" in error
    cut = RowLayout(14, 2, "cut")
    batch = pack_samples(samples, [0.0, 1.0], cut)
    assert count_cut_samples(samples, cut) == 1
    assert (batch["segment_ids"] == 2).sum() == 7
    assert batch["weights"].sum() == 3 + 6


@pytest.mark.parametrize("advantage", [float("nan"), float("inf")])
def test_bad_advantages_and_too_few_rows(advantage):
    samples = [make_sample(i, [1], [(2, True)]) for i in range(3)]
    layout = RowLayout(8, 2)
    error = message(pack_samples, samples, [0.0, advantage, 0.0], layout)
    assert f"the advantage of sample 1 of row 0 is {advantage}" in error
    error = message(pack_samples, samples, [0.0] * 3, layout, num_rows=1)
    assert "3 samples take 2 rows, and there are 1" in error
