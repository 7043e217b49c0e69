"""Rows of dictionaries become batches: each example exactly once an epoch, whoever
reads which rows and wherever a run resumes; packed rows hold what padded ones do."""

import json
import pickle

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.data.batch_source import BatchArraySpec
from maxlm.data.loader.batches import load_batches
from maxlm.data.row_files import open_rows
from maxlm.data.rows import make_row_source

SEQ, ROWS, EXAMPLES = 16, 4, 37
ARRAYS = {
    **{
        name: BatchArraySpec.of_tokens(SEQ)
        for name in ("tokens", "segment_ids", "positions")
    },
    "weights": BatchArraySpec.of_tokens(SEQ, np.float32),
}


def encode(row):
    tokens = row["prompt"] + row["completion"]
    weights = [0] * len(row["prompt"]) + [1] * len(row["completion"])
    return {"tokens": tokens, "weights": weights}


def example(i):
    """Tokens that say which example it is."""
    return {"prompt": [i + 1] * (1 + i % 5), "completion": [i + 1, 1000 + i]}


@pytest.fixture(params=["jsonl", "parquet"])
def file(request, tmp_path):
    rows = [example(i) for i in range(EXAMPLES)]
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    else:
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    return open_rows(path)


def make(file, examples_per_row=1, shuffle=True, endless=True):
    lengths = np.array([len(encode(file[i])["tokens"]) for i in range(len(file))])
    return make_row_source(
        file,
        encode,
        ARRAYS,
        ROWS,
        seed=3,
        lengths=lengths,
        examples_per_row=examples_per_row,
        shuffle=shuffle,
        endless=endless,
    )


def found(batch):
    """The examples of a batch by number, as (tokens, weights, positions)."""
    examples = {}
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max(initial=0) + 1):
            in_segment = batch["segment_ids"][row] == segment
            tokens = batch["tokens"][row][in_segment]
            weights = batch["weights"][row][in_segment]
            positions = batch["positions"][row][in_segment]
            number = int(tokens[0]) - 1
            assert number not in examples
            examples[number] = (tokens.tolist(), weights.tolist(), positions.tolist())
    return examples


def epoch(source, number=0):
    """One epoch's examples, read row by row."""
    examples = {}
    order = []
    first = number * source.rows_per_epoch
    for index in range(first, first + source.rows_per_epoch):
        row_examples = found(source.rows(index // ROWS, [index % ROWS]))
        assert not row_examples.keys() & examples.keys()
        examples |= row_examples
        order += row_examples
    return examples, order


@pytest.mark.parametrize("packed", [1, 3, None])
def test_every_epoch_has_each_example_once_in_an_order_of_its_own(file, packed):
    source = make(file, examples_per_row=packed)
    first, order = epoch(source)
    second, other = epoch(source, 1)
    assert first == second
    assert order != other
    for i, (tokens, weights, positions) in first.items():
        want = encode(example(i))
        assert (tokens, weights) == (want["tokens"], want["weights"])
        assert positions == list(range(len(tokens)))
    assert sorted(first) == list(range(EXAMPLES))
    assert epoch(make(file, examples_per_row=None))[0] == epoch(make(file))[0]
    if packed is None:
        assert source.rows_per_epoch < EXAMPLES / 2
    else:
        assert np.diff(source.row_offsets).max() == packed


@pytest.mark.parametrize("packed", [1, 3, None])
def test_batches_do_not_depend_on_hosts_workers_or_where_a_run_resumes(file, packed):
    source = make(file, examples_per_row=packed)
    whole = [source.rows(step, range(ROWS)) for step in range(12)]
    again = pickle.loads(pickle.dumps(make(file, examples_per_row=packed)))
    for rows in ([3, 1], [0], [2]):
        with load_batches(again, rows, start_step=5, num_steps=7) as batches:
            for step, batch in enumerate(batches, 5):
                for name, array in batch.items():
                    np.testing.assert_array_equal(array, whole[step][name][rows])


def test_one_pass_keeps_the_files_order_and_is_filled_up_with_padding(file):
    source = make(file, shuffle=False, endless=False)
    assert source.num_steps == 10
    batches = list(load_batches(source, range(ROWS)))
    assert [i for batch in batches for i in found(batch)] == list(range(EXAMPLES))
    assert not batches[-1]["weights"][1:].any()


def test_segments_are_numbered_on_and_examples_have_entries_of_their_own(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"a": [5, 6], "b": [8], "score": 0.5}\n' * 3)
    arrays = ARRAYS | {"score": BatchArraySpec((2,), np.float32, (None,))}

    def encode(row):
        tokens = row["a"] + row["b"]
        segments = np.repeat([1, 2], [len(row["a"]), len(row["b"])])
        arrays = {"tokens": tokens, "segment_ids": segments, "positions": [0, 1, 0]}
        return arrays | {"weights": np.ones(3), "score": row["score"]}

    rows = open_rows(tmp_path / "pairs.jsonl")
    source = make_row_source(
        rows, encode, arrays, 2, seed=0, lengths=np.full(3, 3), examples_per_row=2
    )
    batch = source.rows(0, [0, 1])
    sizes = batch["segment_ids"].max(-1)
    assert sorted(sizes) == [2, 4]
    (two,) = np.flatnonzero(sizes == 4)
    assert batch["segment_ids"][two].tolist()[:7] == [1, 1, 2, 3, 3, 4, 0]
    assert batch["score"][two].tolist() == [0.5, 0.5]
    assert batch["score"][1 - two].tolist() == [0.5, 0]


def test_an_example_longer_than_a_row_is_named(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": [1] * 20, "completion": [2]}))
    with pytest.raises(
        MaxlmError, match=r"row 0: an example of 21 tokens, where a row .* has 16"
    ):
        make(open_rows(path)).rows(0, [0])


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.jsonl", "\n", "the file has no rows"),
        ("a.jsonl", "", "the file has no rows"),
        ("a.txt", "{}", "no file of rows"),
        ("a.jsonl", "{\n", "row 0: no JSON object"),
        (None, "", "no such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, text, fault):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(MaxlmError, match=fault):
        open_rows(tmp_path / (name or "a.jsonl"))[0]
