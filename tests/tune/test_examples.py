"""``maxlm tune show``: what is learnt of rows, in text, in colour and as JSON."""

import json

import pytest

from maxlm.cli.tune import show
from maxlm.config import MaxlmError
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.tune.examples import (
    describe_examples,
    infer_task_kind,
    render_examples,
)

pytest.importorskip("jinja2")


def talk(*texts):
    roles = ["user", "assistant"] * len(texts)
    return {
        "messages": [
            {"role": r, "content": t} for r, t in zip(roles, texts, strict=False)
        ]
    }


@pytest.fixture
def folder(tmp_path):
    config = TokenizerConfig(vocab_size=262, chat="chatml", eos="<|im_end|>")
    train_tokenizer(config, ["the fox jumps over the dog\n" * 9]).save(
        tmp_path / "tokenizer"
    )
    rows = [
        talk("a [b]?", "größer"),
        talk("hi"),
        talk("long " * 40, "no"),
        talk("c", "d", "e", "f"),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.yaml").write_text("")  # as a run's folder
    return tmp_path


def test_rows_are_shown_with_their_masks_and_counted(folder, capsys):
    show(folder / "rows.jsonl", ["data.seq_len=128"], model=str(folder), examples=2)
    printed = capsys.readouterr().out
    assert (
        f"{folder}/rows.jsonl: row 0\n<|im_start|>user\na [b]?<|im_end|>\n" in printed
    )
    assert "<|im_start|>assistant\n«größer<|im_end|>»\n" in printed
    assert printed.count("«") == 3  # row 0 once, row 3 twice
    assert "task.kind=sft: 2 of 4 rows are used" in printed
    assert (
        "1 of 4 rows are left out: longer than 129 tokens (task.too_long=drop)"
        in printed
    )
    assert "1 rows are refused" in printed
    assert "rows.jsonl: row 1: no assistant turn to learn" in printed


def test_json_says_the_same_and_colours_show_what_is_learnt(folder, capsys):
    settings = ["task.turns=last", "data.seq_len=128"]
    show(
        folder / "rows.jsonl",
        settings,
        model=str(folder / "tokenizer"),
        examples=2,
        as_json=True,
    )
    report = json.loads(capsys.readouterr().out)
    learnt = [
        [s["text"] for s in e["spans"] if s["learnt"]] for e in report["examples"]
    ]
    assert learnt == [["größer", "<|im_end|>"], ["f", "<|im_end|>"]]
    first = "".join(span["text"] for span in report["examples"][0]["spans"])
    assert first.startswith("<|im_start|>user\na [b]?<|im_end|>\n")
    sizes = [
        sum(len(s["text"].encode()) for s in e["spans"]) for e in report["examples"]
    ]
    assert report["tokens"][0] < report["tokens"][2] < max(sizes)
    assert 0 < report["share_learnt"] < 0.5
    text = render_examples(report, in_colour=True)
    coloured = [
        text.plain[span.start : span.end]
        for span in text.spans
        if "green" in span.style
    ]
    assert coloured == [piece for example in learnt for piece in example]


def test_kinds_are_guessed_and_unknown_ones_named(folder):
    forms = {
        "messages": "sft",
        "prompt completion": "sft",
        "prompt chosen rejected": "dpo",
    }
    forms |= {"prompt completion label": "kto"}
    assert {columns: infer_task_kind(columns.split()) for columns in forms} == forms
    for kind in ("clm", "nonsense"):
        with pytest.raises(
            MaxlmError, match=f"called '{kind}'; name another .* are messages"
        ):
            describe_examples(folder / "rows.jsonl", folder, kind=kind)
    with pytest.raises(MaxlmError, match=r"task\.turn\b.*turns"):
        describe_examples(folder / "rows.jsonl", folder, ["task.turn=last"])
    with pytest.raises(MaxlmError, match="no such file"):
        describe_examples(folder / "none.jsonl", folder)
