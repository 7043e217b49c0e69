"""Rows in the forms of ShareGPT, Alpaca and columns of other names are read as the same
rows in the forms of tasks; tools and variables of the template reach it, or the row is
refused."""

import inspect
import json
import pickle
import textwrap
from functools import cache

import pytest

from maxlm.config import MaxlmError
from maxlm.data.conversations import encode_pair
from maxlm.data.row_files import open_rows
from maxlm.data.row_forms import convert_row
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.tasks.kto import KtoTask
from maxlm.tasks.rows import scan_examples
from maxlm.tasks.sft import SftTask

pytest.importorskip("jinja2")

# Writes tools and calls, and opens an answer otherwise where `brief` is set.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% "
    "endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if brief and m.role == 'assistant' %}(brief) {% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor "
    "%}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if brief %}(brief) {% endif %}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}},
}
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Köln"}},
}
USER = {"role": "user", "content": "Rain?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "dry"}
ANSWER = {"role": "assistant", "content": "No."}
CHAT = [USER, CALLS, RESULT, ANSWER]


@cache
def train_once():
    config = TokenizerConfig(vocab_size=500, chat="chatml", eos="<|im_end|>")
    return pickle.dumps(train_tokenizer(config, [inspect.getsource(textwrap)]))


def make_tokenizer(template=WITH_TOOLS):
    tokenizer = pickle.loads(train_once())
    if template is not None:
        tokenizer.extra_files["chat_template.jinja"] = template.encode()
    return tokenizer


def render(row, template=WITH_TOOLS):
    """The text of a row as the task sft reads it."""
    tokenizer = make_tokenizer(template)
    (encoded,) = SFT.encode_example(tokenizer, row)
    return tokenizer.decode(encoded.tokens)


SFT = SftTask(files=("x.jsonl",))
TOOL_TEXT = f"<|im_start|>system\n{json.dumps(TOOL)}\n<|im_end|>\n"


def test_tools_may_be_data_or_json():
    for tools in ([TOOL], json.dumps([TOOL])):
        text = render({"messages": CHAT, "tools": tools})
        assert text.startswith(f"{TOOL_TEXT}<|im_start|>user\nRain?<|im_end|>\n")
    for tools in (None, [], "", "[]", "null"):
        text = render({"messages": CHAT, "tools": tools})
        assert text.startswith("<|im_start|>user\nRain?<|im_end|>\n")


def test_tools_and_variables_reach_every_form_of_row():
    more = {
        "tools": json.dumps([TOOL]),
        "chat_template_kwargs": {"brief": True, "none": None},
    }
    question = (
        f"{TOOL_TEXT}<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n(brief) "
    )
    row = {"prompt": [USER], "completion": [ANSWER], "label": True} | more
    tokenizer = make_tokenizer()
    for encoded in (*SFT.encode_example(tokenizer, row), *encode_kto(tokenizer, row)):
        prompt = encoded.tokens[: encoded.is_target.index(True)]
        assert prompt == tokenizer.encode(question, allow_special=True)
    pair = {"prompt": [USER], "chosen": [ANSWER], "rejected": "Yes."} | more
    for encoded in encode_pair(tokenizer, pair):
        prompt = encoded.tokens[: encoded.is_target.index(True)]
        assert prompt == tokenizer.encode(question, allow_special=True)


def encode_kto(tokenizer, row):
    task = KtoTask(files=("x.jsonl",))
    encoder = task.make_encoder(tokenizer, 400)
    whole = task.encode_example(tokenizer, row)
    arrays = task.extend_example(encoder, row | {"mismatched_completion": "Wet."}, {})
    learnt = arrays["kl_weights"] > 0
    start = int(learnt.argmax())
    # What comes before the other row's completion is the same prompt.
    assert arrays["kl_tokens"][: start + 1].tolist() == whole[0].tokens[: start + 1]
    return whole


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"messages": [USER, ANSWER], "tools": [TOOL]}, "the tool 'weather'"),
        ({"messages": [USER, CALLS]}, "the call of 'weather' in message 1"),
        ({"messages": CHAT}, "the call of 'weather' in message 1"),
        (
            {"prompt": [USER], "completion": [CALLS]},
            "the call of 'weather' in message 1",
        ),
        (
            {"prompt": [USER], "completion": "No.", "tools": [TOOL]},
            "the tool 'weather'",
        ),
    ],
)
def test_a_template_without_tools_is_named(row, lost):
    with pytest.raises(
        MaxlmError, match=f"the chat template chatml does not write {lost}"
    ):
        SFT.encode_example(make_tokenizer(None), row)
    name = r"chat_template\.jinja"
    untouched = "{% for m in messages if m.role != 'tool' %}[{{ m.content }}]{% endfor %} weather"
    with pytest.raises(
        MaxlmError, match=f"the chat template {name} does not write {lost}"
    ):
        SFT.encode_example(make_tokenizer(untouched), row)
    render(row)  # One that knows them takes the row.


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"tools": "weather"}, "tools is text that is no JSON"),
        ({"tools": "[" * 100_000}, "tools is text that is no JSON"),
        ({"tools": {"name": "f"}}, "tools is no list of functions"),
        ({"tools": ["f"]}, "tools is no list of functions"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is of type list"),
        ({"chat_template_kwargs": {"tools": []}}, "sets tools, which is no variable"),
    ],
)
def test_tools_and_variables_that_are_none_are_refused(columns, fault):
    with pytest.raises(MaxlmError, match=fault):
        SFT.encode_example(make_tokenizer(), {"messages": [USER, ANSWER]} | columns)
    text = {"prompt": "Rain?", "completion": "No.", "tools": [TOOL]}
    with pytest.raises(
        MaxlmError, match="tools beside a prompt and a completion of plain text"
    ):
        SFT.encode_example(make_tokenizer(), text)


SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [
    {"from": "human", "value": "Rain?"},
    {
        "from": "function_call",
        "value": '{"name": "weather", "arguments": {"place": "Köln"}}',
    },
    {"from": "observation", "value": "dry"},
    {"from": "gpt", "value": "No."},
]
ALPACA = {"instruction": "Rain?", "input": "in Köln", "output": "No."}
ASKED = [{"role": "user", "content": "Rain?\nin Köln"}]
PLAIN = {"conversations": [SHAREGPT[0], SHAREGPT[3]]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": SHAREGPT}, {"messages": CHAT}),
        (PLAIN | {"system": "Be brief."}, {"messages": [SYSTEM, USER, ANSWER]}),
        ({"conversations": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
        ({"messages": PLAIN["conversations"]}, {"messages": [USER, ANSWER]}),
        (
            {"conversations": [SHAREGPT[0]], "chosen": SHAREGPT[3], "rejected": ANSWER},
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
        ),
        (ALPACA, {"prompt": ASKED, "completion": "No."}),
        (ALPACA | {"input": ""}, {"prompt": [USER], "completion": "No."}),
        (
            ALPACA | {"system": "Be brief.", "history": [["a", "b"]]},
            {
                "prompt": [
                    SYSTEM,
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    *ASKED,
                ],
                "completion": "No.",
            },
        ),
        (
            {"instruction": "Rain?", "chosen": "No.", "rejected": "Yes."},
            {"prompt": [USER], "chosen": "No.", "rejected": "Yes."},
        ),
    ],
)
def test_rows_of_other_tools_are_rows_of_ours(row, expected):
    converted = convert_row(row, {})
    assert converted == row | expected
    if "chosen" not in row:
        tokenizer = make_tokenizer()
        assert SFT.encode_example(tokenizer, converted) == SFT.encode_example(
            tokenizer, expected
        )


def test_columns_are_renamed_by_the_config(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "Rain?", "reply": "No.", "prompt": "unused", "kept": 1}] * 2
    path.write_text("\n".join(map(json.dumps, rows)))
    task = SftTask(
        files=(str(path),), columns={"prompt": "question", "completion": "reply"}
    )
    file = task.open_files("files")
    assert file[0] == {"prompt": "Rain?", "completion": "No.", "kept": 1}
    assert pickle.loads(pickle.dumps(file))[1] == file[1]
    task = SftTask(files=(str(path),), columns={"prompt": "query"})
    fault = r"rows\.jsonl: no column 'query', which task\.columns names for prompt: there are 'quest"
    with pytest.raises(MaxlmError, match=fault):
        task.open_files("files")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            "a turn from function_cal",
        ),
        ({"instruction": 3, "output": "x"}, "instruction and input are no text"),
        ({"instruction": "", "output": "x"}, "the instruction is empty"),
        (ALPACA | {"history": ["a"]}, "history is no list of pairs of texts"),
        (ALPACA | {"history": 3}, "history is no list of pairs of texts"),
    ],
)
def test_a_fault_of_a_foreign_row_names_its_place(tmp_path, row, fault):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(MaxlmError, match=rf"rows\.jsonl: row 0: {fault}"):
        open_rows(path)[0]


def test_nulls_that_parquet_fills_in_say_nothing(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tools = [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"place": "text"}},
        },
        {
            "type": "function",
            "function": {"name": "time", "parameters": {"zone": "text"}},
        },
    ]
    rows = [
        {"messages": CHAT, "tools": tools},
        {"messages": [USER, ANSWER], "tools": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    file = open_rows(tmp_path / "rows.parquet")
    assert [file[0], file[1]] == rows


def test_refused_rows_are_skipped_where_asked(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": "b", "label": True}] * 4
    lines = [*map(json.dumps, rows), '{"prompt": ', json.dumps({"prompt": "c"})]
    path.write_text("\n".join(lines[i] for i in (0, 4, 1, 5, 2, 3)))
    for task in (SftTask(files=(str(path),)), KtoTask(files=(str(path),))):
        file = task.open_files("files")
        encoder = task.make_encoder(make_tokenizer(), 64)
        scan = scan_examples(encoder, file, [*range(6)], keep_errors=True)
        # A bad row does not take the one behind it along, whose foil KTO would read
        # from it.
        assert [length > 0 for length in scan.lengths] == [
            True,
            False,
            True,
            False,
            True,
            True,
        ]
        assert [error.where for error in scan.errors] == [
            f"{path}: row {i}" for i in (1, 3)
        ]
