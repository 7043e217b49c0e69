"""``maxlm generate``: options reach the sampler, text reaches the terminal as it
comes."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from maxlm.config.sampling import SamplingConfig
from maxlm.run.config import FinalSamplesConfig


@pytest.fixture
def calls(monkeypatch):
    """What the command asked for; every row is continued by its number, piece by
    piece."""
    seen = SimpleNamespace()

    def load_model(folder, *, step):
        seen.folder, seen.step = folder, step
        config = SimpleNamespace(
            samples=FinalSamplesConfig(temperature=0.25, top_k=7, prompts=("x",))
        )
        return SimpleNamespace(model=None, params=None, tokenizer=None, config=config)

    def generate_text(model, params, tokenizer, prompts, sampling, items=None):
        seen.prompts, seen.sampling, seen.items = prompts, sampling, items
        for piece in (" a", "", "ß"):
            yield [f"{piece}{row}" if piece else "" for row in range(len(prompts))]

    def search_text(*arguments, num_beams, num_samples):
        seen.search = num_beams, num_samples
        return generate_text(*arguments)

    monkeypatch.setattr("maxlm.inference.text.search_text", search_text)
    monkeypatch.setattr("maxlm.run.load.load_model", load_model)
    monkeypatch.setattr("maxlm.inference.text.generate_text", generate_text)
    return seen


def test_prompts_and_what_follows_them(calls, run):
    assert run("generate", "runs/x", "hello") == (0, "hello a0ß0\n", "")
    assert (calls.folder, calls.step, calls.prompts) == ("runs/x", None, [b"hello"])
    assert run("generate", "runs/x", "one", "two").out == (
        "──── prompt 1 ────\none a0ß0\n\n──── prompt 2 ────\ntwo a1ß1\n"
    )


def test_options_go_before_the_runs_own_settings(calls, run):
    run("generate", "runs/x", "p")
    assert calls.sampling == SamplingConfig(temperature=0.25, top_k=7)
    options = [
        "--temperature=0",
        "--top-p=0.5",
        "--max-new-tokens=3",
        "--seed=9",
        "--step=40",
    ]
    run("generate", "runs/x", "p", *options)
    assert calls.step == 40
    assert calls.sampling == SamplingConfig(
        temperature=0, top_k=7, top_p=0.5, max_new_tokens=3, seed=9
    )


def test_searches(calls, run):
    for option, search in (("--beams=3", (3, 1)), ("--best-of=4", (None, 4))):
        assert run("generate", "runs/x", "hello", option).out == "hello a0ß0\n"
        assert calls.search == search
    code, _, error = run("generate", "runs/x", "hello", "--beams=3", "--best-of=4")
    assert (code, error.count("\n"), "two ways" in error) == (2, 1, True)


def test_items_of_a_frontend_come_from_a_file(calls, run, tmp_path):
    path = tmp_path / "items.npz"
    np.savez(path, images=np.ones((2, 3)), tags=np.arange(2))
    assert run("generate", "runs/x", "hello", f"--items={path}").code == 0
    assert calls.items["images"].shape == (2, 3)
    assert calls.items["tags"].tolist() == [0, 1]
    code, _, error = run("generate", "runs/x", "p", f"--items={path}", "--beams=3")
    assert (code, error.count("\n"), "--items with a search" in error) == (2, 1, True)
    path.write_text("no arrays")
    code, _, error = run("generate", "runs/x", "p", f"--items={path}")
    assert (code, error.count("\n"), "numpy.savez" in error) == (2, 1, True)


def test_standard_input_and_arguments_byte_for_byte(calls, run, monkeypatch):
    data = b"from \xff stdin\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    shown = run("generate", "runs/x", "-", "\udcfe").out
    assert calls.prompts == [data, b"\xfe"]
    assert "from \ufffd stdin\n a0ß0\n" in shown


def test_a_bad_option_before_anything_is_loaded(calls, run):
    message = "error: command line: top_p must be less than or equal to 1, not 1.5\n"
    assert run("generate", "runs/x", "p", "--top-p=1.5") == (2, "", message)
    assert not hasattr(calls, "folder")
