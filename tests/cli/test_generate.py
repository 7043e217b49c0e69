"""``maxlm generate``: options reach the sampler, text reaches the terminal as it comes."""

import io
import sys
from types import SimpleNamespace

import pytest

from maxlm.cli.main import main
from maxlm.inference.sampling import SamplingConfig
from maxlm.run import SamplesConfig


@pytest.fixture
def calls(monkeypatch):
    """What the command asked for; every row is continued by its number, piece by piece."""
    seen = SimpleNamespace()

    def load_run(folder, *, step):
        seen.folder, seen.step = folder, step
        samples = SamplesConfig(temperature=0.25, top_k=7, prompts=("x",))
        return SimpleNamespace(
            model=None, params=None, tokenizer=None, config=SimpleNamespace(samples=samples)
        )

    def generate_text(model, params, tokenizer, prompts, sampling):
        seen.prompts, seen.sampling = prompts, sampling
        for piece in (" a", "", "ß"):
            yield [f"{piece}{row}" if piece else "" for row in range(len(prompts))]

    monkeypatch.setattr("maxlm.programs.load.load_run", load_run)
    monkeypatch.setattr("maxlm.programs.generate.generate_text", generate_text)
    return seen


def test_one_prompt(calls, capsys):
    assert main(["generate", "runs/x", "hello"]) == 0
    assert capsys.readouterr().out == "hello a0ß0\n"
    assert (calls.folder, calls.step, calls.prompts) == ("runs/x", None, [b"hello"])


def test_several_prompts_have_headings(calls, capsys):
    assert main(["generate", "runs/x", "one", "two"]) == 0
    assert capsys.readouterr().out == (
        "──── prompt 1 ────\none a0ß0\n\n──── prompt 2 ────\ntwo a1ß1\n"
    )


def test_options_go_before_the_runs_own_settings(calls):
    assert main(["generate", "runs/x", "p"]) == 0
    assert calls.sampling == SamplingConfig(temperature=0.25, top_k=7)
    arguments = ["--temperature=0", "--top-p=0.5", "--max-new-tokens=3", "--seed=9", "--step=40"]
    assert main(["generate", "runs/x", "p", *arguments]) == 0
    assert calls.step == 40
    assert calls.sampling == SamplingConfig(
        temperature=0, top_k=7, top_p=0.5, max_new_tokens=3, seed=9
    )


def test_standard_input_and_arguments_byte_for_byte(calls, capsys, monkeypatch):
    data = b"from \xff stdin\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["generate", "runs/x", "-", "\udcfe"]) == 0
    assert calls.prompts == [data, b"\xfe"]
    assert "from \ufffd stdin\n a0ß0\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ["--temperature=-1"],
            "command line: temperature must be greater than or equal to 0, not -1.0",
        ),
        (["--top-p=1.5"], "command line: top_p must be less than or equal to 1, not 1.5"),
        (["--top-k=-3"], "command line: top_k must be greater than or equal to 0, not -3"),
        (["--max-new-tokens=0"], "command line: max_new_tokens must be greater than 0, not 0"),
    ],
)
def test_bad_options_before_anything_is_loaded(calls, capsys, option, message):
    assert main(["generate", "runs/x", "p", *option]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not hasattr(calls, "folder")
