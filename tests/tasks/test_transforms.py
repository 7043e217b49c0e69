"""What tasks do to the loader's batches: pure in (seed, step, row), and invertible."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maxlm.data.loader.batches import LoaderConfig
from maxlm.tasks import SourceInputs, Vocabulary
from maxlm.tasks.denoising import SpanCorruptionTask, Ul2Task
from maxlm.tasks.mlm import MlmTask
from maxlm.tasks.text import TransformedSource

TEXT = 50
SIZE = 90
BOS = 1
EOS = 2
MARK = np.isin(np.arange(SIZE), [0, BOS, EOS]) | (np.arange(SIZE) >= TEXT)
VOCABULARY = Vocabulary(SIZE, (BOS,), EOS, MARK, np.arange(SIZE) % 3 == 0)
TASKS = [
    MlmTask(),
    MlmTask(whole_words=True, share=0.3, mask_id=4),
    SpanCorruptionTask(sentinels=30),
    Ul2Task(sentinels=30, regular_id=5, sequential_id=6, extreme_id=7),
]


def transform_of(task, start_id: int = 0, seed: int = 0):
    inputs = SourceInputs(LoaderConfig(), seed, VOCABULARY, start_id=start_id)
    # As loader processes get it.
    change = pickle.loads(pickle.dumps(task.make_row_transform(inputs)))

    def transform(batch, step, row_numbers):
        source: Any = SimpleNamespace(rows=lambda *_: batch)
        return TransformedSource(source, change, seed).rows(step, row_numbers)

    return transform


def batch(rows: int = 3, seq_len: int = 203, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two documents with their marks, and padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(10, TEXT, (rows, seq_len), dtype=np.int32)
    segments = np.ones((rows, seq_len), np.int32)
    segments[:, 110:] = 2
    segments[:, 190:] = 0
    tokens[:, [0, 110]] = BOS
    tokens[:, [109, 189]] = EOS
    tokens[segments == 0] = 0
    positions = np.where(segments == 2, np.arange(seq_len) - 110, np.arange(seq_len))
    targets = np.roll(tokens, -1, axis=1)
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": np.ones((rows, seq_len), np.float32),
        "segment_ids": segments,
        "positions": positions.astype(np.int32),
    }


@pytest.mark.parametrize("task", TASKS, ids=lambda o: o.kind)
def test_a_row_depends_on_its_number_the_step_and_the_seed_alone(task):
    transform = transform_of(task, seed=3)
    before = batch()
    copies = {name: array.copy() for name, array in before.items()}
    whole = transform(before, 7, [4, 5, 6])
    assert all(
        np.array_equal(before[name], copies[name]) for name in copies
    )  # left as it was
    alone = transform({name: a[1:2] for name, a in before.items()}, 7, [5])
    assert all(np.array_equal(alone[name][0], whole[name][1]) for name in whole)
    assert not np.array_equal(
        transform(before, 8, [4, 5, 6])["targets"], whole["targets"]
    )
    assert not np.array_equal(
        transform(before, 7, [5, 5, 6])["targets"][0], whole["targets"][0]
    )
    other = transform_of(task, seed=4)(before, 7, [4, 5, 6])
    assert not np.array_equal(other["targets"], whole["targets"])
    planned = task.batch_arrays(203)
    assert {n: (a.shape[1:], a.dtype.type) for n, a in whole.items()} == {
        n: (a.shape, a.dtype) for n, a in planned.items()
    }


@pytest.mark.parametrize("task", TASKS[2:], ids=lambda o: o.kind)
def test_what_was_taken_out_is_in_the_targets_and_documents_stay_apart(task):
    before = batch()
    after = transform_of(task, start_id=9, seed=0)(before, 0, [0, 1, 2])
    for row in range(3):
        for segment in (1, 2):
            is_document = before["segment_ids"][row] == segment
            text = before["tokens"][row][is_document][1:-1]
            inputs = after["input_tokens"][row][
                after["input_segment_ids"][row] == segment
            ]
            is_in_segment = after["segment_ids"][row] == segment
            if not is_in_segment.any():
                continue  # no room was left for it
            targets, tokens = (
                after["targets"][row][is_in_segment],
                after["tokens"][row][is_in_segment],
            )
            assert tokens[0] == 9
            assert np.array_equal(tokens[1:], targets[:-1])
            assert inputs[-1] == targets[-1] == EOS
            assert inputs[0] == BOS
            # The last document is cut to what fits; others are whole, in inputs and
            # targets.
            words = np.concatenate([inputs, targets])
            words = words[(words >= 10) & (words < TEXT)]
            assert np.array_equal(np.sort(words), np.sort(text[: words.size]))
            assert words.size >= 0.9 * text.size
        assert np.array_equal(after["weights"][row] > 0, after["segment_ids"][row] > 0)
