"""Promise: which prompt comes when follows from the seed and a number alone, and what is
wrong with a prompt is one line."""

import json
from functools import partial

import numpy as np
import pytest

from maxlm.rl.environments import SingleTurnEnvironment
from maxlm.rl.environments.addition import AdditionEnvironment
from maxlm.rl.environments.calculator import CalculatorEnvironment
from maxlm.rl.rewards.exact_match import ExactMatchReward
from maxlm.rl.rewards.runner import check_row
from maxlm.rl.rollouts.prompts import PromptOrder
from tests.errors import message


@pytest.fixture
def write_rows(tmp_path):
    def write(*rows) -> SingleTurnEnvironment:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return SingleTurnEnvironment(files=(str(path),), columns={"prompt": "question"})

    return write


@pytest.fixture
def order(chat_tokenizer):
    def make(
        environment,
        *,
        seed=0,
        max_prompt_length=30,
        long_prompts="refuse",
        shuffle=True,
        check_row=None,
    ) -> PromptOrder:
        return PromptOrder(
            environment,
            chat_tokenizer,
            seed=seed,
            max_prompt_length=max_prompt_length,
            long_prompts=long_prompts,
            shuffle=shuffle,
            check_row=check_row,
        )

    return make


def test_every_epoch_has_each_prompt_once(write_rows, order):
    environment = write_rows(*[{"question": f"{i}?", "answer": i} for i in range(13)])
    prompts = order(environment)
    epochs = [[p.row_number for p in prompts.take(13 * i, 13)] for i in range(3)]
    assert all(sorted(epoch) == [*range(13)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # Any place alone, in another process.
    again = order(environment).take(12, 3)
    assert [p.row_number for p in again] == [epochs[0][12], *epochs[1][:2]]
    assert again[0].row == {"answer": epochs[0][12], "prompt": f"{epochs[0][12]}?"}
    assert [p.row_number for p in order(environment, seed=1).take(0, 13)] != epochs[0]
    in_order = order(environment, shuffle=False).take(11, 4)
    assert [p.row_number for p in in_order] == [11, 12, 0, 1]


def test_prompts_that_are_too_long(write_rows, order):
    rows = [{"question": "a " * (60 if i in (2, 5) else 3)} for i in range(7)]
    environment = write_rows(*rows)
    error = message(order, environment)
    assert "rows.jsonl: row 2: a prompt of" in error
    assert "room for 30; 2 prompts are too long" in error
    prompts = order(environment, long_prompts="leave_out")
    assert prompts.num_left_out == 2
    assert prompts.prompts_per_epoch == 5
    taken = {p.row_number for p in prompts.take(0, 5)}
    assert taken == {0, 1, 3, 4, 6}
    assert "too long" in message(
        order, environment, long_prompts="leave_out", max_prompt_length=2
    )
    # Rows without end are read when their turn comes.
    sums = order(AdditionEnvironment(template="{a}+{b} " * 20))
    assert "environment.kind=addition: row 4" in message(sums.take, 4, 1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": None}, "row 1, prompt: the prompt is neither text nor messages"),
        ({"text": "x"}, "row 1, prompt: the prompt is neither text nor messages"),
        (
            {"question": [{"role": "assistant", "content": "x"}]},
            "the prompt ends with the assistant's message",
        ),
        (
            {"question": [{"role": "user", "content": "x"}], "tools": [3]},
            "row 1, tools: tools is no list of functions",
        ),
    ],
)
def test_bad_rows_are_one_line(write_rows, order, row, expected):
    error = message(order, write_rows({"question": "a"}, row))
    assert expected in error
    assert "row 1" in error


def test_every_row_of_files_has_what_rewards_read(write_rows, order):
    rows = [{"question": f"{i}?", "answer": "x"} for i in range(9)]
    del rows[7]["answer"]
    check = partial(check_row, [ExactMatchReward(), ExactMatchReward(name="again")])
    error = message(order, write_rows(*rows), check_row=check)
    assert error.startswith("reward exact_match, ")
    assert "rows.jsonl: row 7: no column 'answer'" in error
    del rows[7]
    assert order(write_rows(*rows), check_row=check).prompts_per_epoch == 8
    # Rows without end are not read.
    order(AdditionEnvironment(template="{a}"), check_row=check)


def test_no_files(order):
    environment = SingleTurnEnvironment()
    assert "environment.files: environment.kind=single_turn" in message(
        order, environment
    )
    error = message(environment.check_files, "task.environment.files", "--prompts FILE")
    assert error.endswith("name a .jsonl or .parquet file: --prompts FILE")
    missing = SingleTurnEnvironment(files=("nowhere/rows.jsonl",))
    error = message(missing.check_files, "task.environment.files", "--prompts FILE")
    assert error.startswith("task.environment.files, nowhere/rows.jsonl: no such file")
    CalculatorEnvironment().check_files("task.environment.files", "--prompts FILE")


def test_messages_and_texts_are_written_by_the_template(
    write_rows, order, chat_tokenizer
):
    question = [{"role": "user", "content": "a?"}]
    answer = {"role": "assistant", "content": "b"}
    environment = write_rows(
        {"question": "a?"}, {"question": question}, {"messages": [*question, answer]}
    )
    plain, *chats = order(environment, shuffle=False).take(0, 3)
    written = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    ids = chat_tokenizer.encode(written, allow_special=True)
    assert [list(chat.tokens) for chat in chats] == [ids, ids]
    assert plain.tokens == (
        *chat_tokenizer.prefix_ids,
        *chat_tokenizer.encode("a?"),
    )
    chat = environment.model_copy(update={"chat": True, "system": "be brief"})
    first = order(chat, shuffle=False, max_prompt_length=60).take(0, 1)[0]
    text = f"<|im_start|>system\nbe brief<|im_end|>\n{written}"
    assert list(first.tokens) == chat_tokenizer.encode(text, allow_special=True)


def test_sums_follow_from_the_seed_and_the_row():
    environment = AdditionEnvironment(num_digits=2)
    rows = environment.open_prompts(5)
    drawn = [rows[i] for i in range(2000)]
    assert drawn == [environment.open_prompts(5)[i] for i in range(2000)]
    assert drawn != [environment.open_prompts(6)[i] for i in range(2000)]
    for row in drawn:
        a, b = map(int, row["prompt"].removesuffix("=").split("+"))
        assert int(row["answer"]) == a + b
        assert (row["a"], row["b"]) == (a, b)
    numbers = np.array([(row["a"], row["b"]) for row in drawn])
    # Of 100 values each comes 20 times on average: 8 deviations.
    counts = np.array([np.bincount(column, minlength=100) for column in numbers.T])
    assert counts.shape == (2, 100)
    assert counts.min() > 0
    assert counts.max() < 20 + 8 * np.sqrt(20)
    assert abs(np.corrcoef(numbers.T)[0, 1]) < 0.1
