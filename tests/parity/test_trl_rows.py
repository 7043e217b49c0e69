"""Rows with tools, variables of the template and ShareGPT's names are the text that TRL
makes."""

import copy
import json
from pathlib import Path

import jinja2
import pytest

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from maxlm.config import MaxlmError  # noqa: E402
from maxlm.data.conversations import encode_pair  # noqa: E402
from maxlm.data.row_files import open_rows  # noqa: E402
from maxlm.data.tokenizer.chat import check_tools_are_written  # noqa: E402
from maxlm.data.tokenizer.load import import_tokenizer  # noqa: E402
from maxlm.tasks.sft import SftTask  # noqa: E402
from tests.data.rows.test_row_forms import (  # noqa: E402
    ANSWER,
    CHAT,
    SHAREGPT,
    TOOL,
    USER,
    WITH_TOOLS,
)
from tests.data.tokenizer.foreign import write_checkpoint  # noqa: E402

transformers.logging.set_verbosity_error()
OTHER = {"role": "assistant", "content": "Yes."}
TOOLS = json.dumps([TOOL, {"type": "function", "function": {"name": "time"}}])
VARIABLES = {"brief": True}
ROWS = [
    {"messages": CHAT, "tools": TOOLS},
    {"messages": CHAT, "tools": TOOLS, "chat_template_kwargs": VARIABLES},
    {"messages": [USER, ANSWER], "tools": "[]"},
    {"prompt": [USER], "completion": [ANSWER], "tools": TOOLS},
    {
        "prompt": CHAT[:3],
        "completion": [ANSWER],
        "tools": TOOLS,
        "chat_template_kwargs": VARIABLES,
    },
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER], "tools": TOOLS},
    {
        "prompt": CHAT[:3],
        "chosen": [ANSWER],
        "rejected": [OTHER],
        "tools": TOOLS,
        "chat_template_kwargs": VARIABLES,
    },
    {
        "conversations": [
            {**SHAREGPT[0], "from": "user"},
            {**SHAREGPT[3], "from": "assistant"},
        ]
    },
]


def render_there(tokenizer, row):
    """The texts of a row, prompt and answer one after the other, as TRL's trainers make
    them."""
    row = trl.data_utils.maybe_convert_to_chatml(copy.deepcopy(row))
    tools = json.loads(row.pop("tools", "[]"))
    texts = trl.data_utils.maybe_apply_chat_template(row, tokenizer, tools=tools)
    if "text" in texts:
        return [texts["text"]]
    return [
        texts["prompt"] + texts[n]
        for n in ("completion", "chosen", "rejected")
        if n in texts
    ]


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_text_of_rows_is_trl(tmp_path, index):
    row = ROWS[index]
    write_checkpoint(tmp_path, "smollm2")
    (tmp_path / "chat_template.jinja").write_text(WITH_TOOLS)
    ours = import_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    read = open_rows(tmp_path / "rows.jsonl")[0]
    if "chosen" in row:
        encoded = encode_pair(ours, read)
    else:
        encoded = SftTask(files=("rows.jsonl",)).encode_example(ours, read)
    expected = render_there(theirs, row)
    assert [sequence.tokens for sequence in encoded] == [
        theirs(text, add_special_tokens=False)["input_ids"] for text in expected
    ]
    assert ("<|im_start|>system" in expected[0]) == (row.get("tools") == TOOLS)


PUBLISHED = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
CONVERSATION = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "a1b2c3d4e", "function": {"name": "weather"}}
        ],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "a1b2c3d4e", "content": "dry"},
    {"role": "assistant", "content": "No."},
]


def test_published_templates_that_write_no_tools_are_refused_and_others_are_not(
    tmp_path,
):
    """Whether a template writes them is told by what transformers renders with
    others."""
    write_checkpoint(tmp_path, "smollm2")
    ours = import_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of today",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "a town"}},
                "required": ["place"],
            },
        },
    }
    counts = {True: 0, False: 0}
    for path in PUBLISHED:
        source = path.read_text()
        ours.extra_files["chat_template.jinja"] = source.encode()
        for arguments in ({"place": "Rome"}, '{"place": "Rome"}'):
            talk = copy.deepcopy(CONVERSATION)
            talk[1]["tool_calls"][0]["function"]["arguments"] = arguments

            def render(talk, tools, source=source):
                return theirs.apply_chat_template(
                    copy.deepcopy(talk),
                    tools=tools,
                    chat_template=source,
                    tokenize=False,
                )

            renamed = json.loads(json.dumps(talk).replace('"weather"', '"climate"'))
            try:
                text = render(talk, [tool])
                is_written = text not in (render(talk, None), render(renamed, [tool]))
            except (jinja2.TemplateError, TypeError, AttributeError):
                continue  # of images, or of roles in another order
            counts[is_written] += 1
            try:
                check_tools_are_written(ours, talk, tools=[tool])
                is_taken = True
            except MaxlmError:
                is_taken = False
            assert is_taken == is_written, path.name
    assert min(counts.values()) > 9, counts
