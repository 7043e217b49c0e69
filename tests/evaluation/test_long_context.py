"""Passkeys stand where they are said to, in prompts of the length that was asked for;
both tables come from a checkpoint's folder."""

import json
import re
from types import SimpleNamespace

import pytest

from maxlm.cli.main import main
from maxlm.evaluation.passkey import (
    SENTENCES,
    build_passkey_prompt,
    evaluate_passkey,
    parse_passkey,
)
from maxlm.evaluation.program import cut_windows
from maxlm.inference.requests import SequenceOutput
from tests.errors import message
from tests.evaluation.test_eval_command import write_checkpoint
from tests.serving.running import train_chat_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_chat_tokenizer()


@pytest.mark.parametrize("length", [500, 1000, 2001])
def test_prompts_fill_their_length_with_the_key_at_its_depth(tokenizer, length):
    shares = []
    for depth in (0, 25, 50, 75, 100):
        prompt = build_passkey_prompt(tokenizer, length, depth, "12345")
        longest = max(len(tokenizer.encode(f" {sentence}")) for sentence in SENTENCES)
        assert length - longest < len(prompt) <= length
        text = tokenizer.decode(prompt)
        assert text.count("12345") == 2
        assert text.endswith("What is the pass key? The pass key is")
        before, behind = (
            re.findall(r"[.]", part) for part in text.split("The pass key is 12345")
        )
        # Three sentences of the task come first; behind the key stand three of its own.
        around = len(before) - 3, len(behind) - 3
        shares.append(100 * around[0] / sum(around))
    assert shares == pytest.approx(
        [0, 25, 50, 75, 100], abs=100 * 0.5 / sum(around) + 1e-6
    )


def test_a_length_without_room_is_refused(tokenizer):
    fault = message(build_passkey_prompt, tokenizer, 100, 0, "12345")
    assert re.fullmatch(
        r"--lengths: a passkey prompt has \d+ tokens, and room for 100; .*", fault
    )


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        (" 12345.", "12345"),
        ("12345 67", "12345"),
        (' "123456', "123456"),
        (" the grass", None),
    ],
)
def test_an_answer_is_its_first_number(answer, key):
    assert parse_passkey(answer) == key


class NearSightedEngine:
    """Answers with the number that stands last among a prompt's last tokens."""

    def __init__(self, tokenizer, sight):
        self.tokenizer = tokenizer
        self.sight = sight
        self.prompts = []

    def run(self, requests):
        for request in requests:
            self.prompts.append(request.prompt_tokens)
            text = self.tokenizer.decode(request.prompt_tokens[-self.sight :])
            ids = self.tokenizer.encode(
                " " + (re.findall(r"\d{5}", text) or ["none"])[-1]
            )
            assert len(ids) <= request.sampling.max_new_tokens
            yield SequenceOutput(request.request_id, 0, ids[:2])
            yield SequenceOutput(request.request_id, 0, ids[2:], finish_reason="length")


def test_accuracy_is_by_length_and_depth(tokenizer):
    engine = NearSightedEngine(tokenizer, 500)
    shares = evaluate_passkey(engine, [600, 2000], [0, 50, 100], 3, seed=1)
    assert shares == [[1, 1, 1], [0, 0, 1]]
    assert len(set(engine.prompts)) == 18
    again = NearSightedEngine(tokenizer, 500)
    evaluate_passkey(again, [600, 2000], [0, 50, 100], 3, seed=1)
    assert again.prompts == engine.prompts


def test_windows_lie_evenly_in_a_text(tmp_path):
    text = tmp_path / "a.txt"
    tokenizer = SimpleNamespace(prefix_ids=(7,), encode=list)
    text.write_bytes(bytes(range(100)))
    windows = cut_windows(tokenizer, text, 11, 4)
    assert [window[:2] for window in windows] == [[7, 0], [7, 20], [7, 50], [7, 70]]
    assert all(len(window) == 11 for window in windows)
    fault = message(cut_windows, tokenizer, text, 200, 4)
    assert fault.startswith(f"{text}: 100 tokens give no window of 200; ")


@pytest.mark.more
def test_tables_of_a_checkpoint(tmp_path, capfd):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    write_checkpoint(model)
    text.write_text("the model answers what it is asked\n" * 40)

    def run(*arguments):
        assert main(["eval", *map(str, arguments)]) == 0
        return capfd.readouterr().out

    command = ["positions", model, "--text", text, "--windows", 3]
    losses = json.loads(run(*command, "--length", 40, "--json"))[str(model)]
    assert [*losses] == ["1", "2", "4", "8", "16", "32", "39"]
    assert all(loss > 0 for loss in losses.values())
    assert re.search(r"65 to 127 +│ +[\d.]+", run(*command))
    command = [
        "passkey",
        model,
        "--lengths",
        "500,700",
        "--depths",
        "0,100",
        "--samples",
        2,
    ]
    report = json.loads(run(*command, "--json"))
    assert (report["lengths"], report["depths"]) == ([500, 700], [0, 100])
    assert report["accuracy"] == [[0, 0], [0, 0]]  # a random model
    assert re.search(r"700 +│ +0% +│ +0%", run(*command))
    assert main(["eval", *map(str, command[:2]), "--lengths", "0"]) == 2
