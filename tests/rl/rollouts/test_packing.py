"""Promise: rows hold every sample's tokens, each drawn one with its weight and
log-probability, and nothing else."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.rl.rollouts.packing import (
    RowLayout,
    pack_samples,
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
@given(SAMPLES, st.integers(1, 3))
def test_rows_hold_every_sample(parts, sequences_per_row):
    samples = [make_sample(i, *part) for i, part in enumerate(parts)]
    layout = RowLayout(8 * sequences_per_row + 1, sequences_per_row)
    num_rows = layout.count_rows(len(samples))
    batch = pack_samples(samples, layout)
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
        assert sequence["weights"].tolist() == drawn.tolist()
        assert sequence["sampled_log_probs"].tolist() == sample.log_probs[1:]
        assert sequence["versions"].tolist() == sample.versions[1:]


def test_long_samples():
    samples = [
        make_sample(i, [1, 2], [(5, True)] * size) for i, size in enumerate((3, 9))
    ]
    layout = RowLayout(14, 2)
    error = message(pack_samples, samples, layout)
    assert "sample 1 of row 0 has 11 tokens" in error
    assert "data.seq_len=14 has room for 2 of 8" in error
