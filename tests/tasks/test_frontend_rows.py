"""Rows of files with a frontend's items: placeholders in their texts, arrays of examples
that share a row, room for items, and what is refused."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.frontends import FrontendConfig, ItemArraySpec
from maxlm.tasks import TASKS, SourceInputs
from maxlm.tasks.task import list_batch_arrays
from tests.tasks.row_cases import EOS, make_inputs, make_task

PLACEHOLDER = 96
WIDTH = 3


class PairsConfig(FrontendConfig):
    """Two vectors an item."""

    kind: Literal["test_pairs"] = "test_pairs"

    @property
    def vectors_per_item(self) -> int:
        return 2

    def item_arrays(self) -> Mapping[str, ItemArraySpec]:
        return {"pairs": ItemArraySpec((2, WIDTH)), "tags": ItemArraySpec((), np.int32)}


FRONTEND = PairsConfig(placeholder_id=PLACEHOLDER)


def make_row(num_items: int, prompt: str, completion: str, start: int = 0) -> Any:
    row: dict[str, Any] = {"prompt": prompt, "completion": completion}
    if num_items:
        count = 2 * WIDTH * num_items
        pairs = start + np.arange(count).reshape(num_items, 2, WIDTH)
        tags = start + np.arange(num_items)
        row |= {"pairs": pairs.tolist(), "tags": tags.tolist()}
    return row


def make_source(
    folder: Any,
    rows: list[Any],
    frontend: FrontendConfig = FRONTEND,
    seq_len: int = 16,
    settings: Any = None,
) -> Any:
    settings = {"kind": "sft", "examples_per_row": None, **(settings or {})}
    task = make_task(folder, rows, **settings)
    inputs = make_inputs(seq_len, 1)
    inputs = SourceInputs(**{**vars(inputs), "frontend": frontend})
    return task.batch_source(inputs)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("5 6", [96, 96, 96, 96, 5, 6]),
        ("5 96 6 96", [5, 96, 96, 6, 96, 96]),
        ("96 5 96 96 96 6", [96, 5, 96, 96, 96, 6]),
    ],
    ids=["none", "one an item", "one a vector"],
)
def test_a_text_has_its_placeholders_where_it_says(prompt, expected, tmp_path):
    source = make_source(tmp_path, [make_row(2, prompt, "7 8")])
    batch = source.rows(0, [0])
    length = len(expected) + 2
    tokens = [*expected, 7, 8]
    assert batch["tokens"][0, :length].tolist() == tokens
    targets = [*tokens[1:], EOS]
    assert batch["targets"][0, :length].tolist() == targets
    # The answer alone is learnt.
    assert batch["weights"][0].tolist() == [0] * 5 + [1] * 3 + [0] * 8
    numbers = batch["frontend.vector_numbers"][0]
    is_placeholder = batch["tokens"][0] == PLACEHOLDER
    assert numbers[is_placeholder].tolist() == [1, 2, 3, 4]
    assert not numbers[~is_placeholder].any()


def test_placeholders_are_not_learnt_with_the_prompt(tmp_path):
    row = make_row(1, "5 96 6", "7")
    batch = make_source(tmp_path, [row], settings={"learn_prompt": True}).rows(0, [0])
    assert batch["tokens"][0, :5].tolist() == [5, 96, 96, 6, 7]
    assert batch["weights"][0, :5].tolist() == [0, 0, 1, 1, 1]


def test_examples_that_share_a_row_number_their_vectors_on(tmp_path):
    rows = [make_row(1, "5", "7", 100), make_row(0, "5", "9"), make_row(1, "6", "8", 9)]
    source = make_source(tmp_path, rows)
    assert source.rows_per_epoch == 1
    batch = {name: array[0] for name, array in source.rows(0, [0]).items()}
    is_placeholder = batch["tokens"] == PLACEHOLDER
    numbers = batch["frontend.vector_numbers"]
    assert numbers[is_placeholder].tolist() == [1, 2, 3, 4]
    # The vectors of each segment are those of the example with its answer.
    start_of_answer = {7: 100, 8: 9}
    for item in range(2):
        segment = batch["segment_ids"][numbers == 1 + 2 * item][0]
        answer = batch["tokens"][batch["segment_ids"] == segment][-1]
        start = start_of_answer[int(answer)]
        assert batch["frontend.tags"][item] == start
        np.testing.assert_array_equal(
            batch["frontend.pairs"][item], start + np.arange(6).reshape(2, WIDTH)
        )
    assert not batch["frontend.tags"][2:].any()


def test_no_row_has_more_items_than_room(tmp_path):
    random = np.random.default_rng(0)
    rows = [make_row(int(n), "5", "7") for n in random.integers(0, 4, 40)]
    frontend = FRONTEND.model_copy(update={"max_items": 3})
    source = make_source(tmp_path, rows, frontend, seq_len=40)
    assert source.rows_per_epoch >= sum(len(row.get("tags", ())) for row in rows) / 3
    seen = 0
    for step in range(source.rows_per_epoch):
        numbers = source.rows(step, [0])["frontend.vector_numbers"]
        assert numbers.max() <= 6
        seen += np.count_nonzero(numbers)
    assert seen == 2 * sum(len(row.get("tags", ())) for row in rows)


def test_an_example_whose_placeholders_are_cut_off_is_left_out(tmp_path):
    rows = [make_row(3, "5", "6 7 8 9"), make_row(1, "5", "7")]
    settings = {"max_length": 8, "too_long": "cut_start"}
    source = make_source(tmp_path, rows, settings=settings)
    assert source.rows_per_epoch == 1
    assert source.rows(0, [0])["frontend.vector_numbers"].max() == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_row(2, "96 5", "7") | {"tags": [1]}, "unlike numbers of items"),
        (make_row(2, "5", "7") | {"tags": None}, "reads pairs, tags, there are pairs"),
        (make_row(1, "5", "7") | {"pairs": [[[1, 2], [3, 4]]]}, r"\[items, 2, 3\]"),
        (make_row(1, "5", "7") | {"pairs": [[[1, 2, 3], [4]]]}, "no array of numbers"),
        (make_row(1, "5", "7") | {"pairs": [{"a": 1}]}, "no array of numbers"),
        (make_row(1, "5", "7") | {"pairs": "text"}, "no array of numbers"),
        (make_row(2, "96 96 96", "7"), "3 placeholders for 4 vectors"),
        (make_row(0, "96 5", "7"), "1 placeholders for 0 vectors"),
        (make_row(9, "5", "7"), "9 items, where a row of a batch has 8"),
    ],
)
def test_a_row_that_does_not_fit_the_frontend_is_one_line(row, message, tmp_path):
    with pytest.raises(MaxlmError, match=message) as caught:
        make_source(tmp_path, [row])
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_without_a_frontend_refuses_items_and_reads_text(tmp_path):
    pair = {"chosen": "7", "rejected": "8"}
    settings: Any = {"kind": "cpo"}
    inputs = SourceInputs(**{**vars(make_inputs(16, 1)), "frontend": FRONTEND})
    task = make_task(tmp_path, [make_row(0, "5", "7") | pair], **settings)
    assert "frontend.pairs" not in task.batch_source(inputs).rows(0, [0])
    task = make_task(tmp_path, [make_row(1, "5", "7") | pair], **settings)
    with pytest.raises(MaxlmError, match=r"pairs, which task\.kind=cpo does not read"):
        task.batch_source(inputs)


def test_batches_have_the_arrays_of_a_task_that_reads_them():
    sft = TASKS.get("sft")()
    plain = sft.batch_arrays(16)
    arrays = list_batch_arrays(sft, FRONTEND, 16)
    added = {name: array.shape for name, array in arrays.items() if name not in plain}
    assert added == {
        "frontend.vector_numbers": (16,),
        "frontend.pairs": (8, 2, WIDTH),
        "frontend.tags": (8,),
    }
    assert list_batch_arrays(TASKS.get("dpo")(), FRONTEND, 16).keys() == plain.keys()
    assert list_batch_arrays(sft, None, 16) == plain
