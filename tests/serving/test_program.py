"""Promise: a server's context is by default the model's own as far as the cache's pages
go, at no more memory; and it says where it is not, and that a CPU's kernels are
missing."""

from types import SimpleNamespace
from typing import Any

import pytest

from maxlm.config.load import load_config
from maxlm.inference.cpu import library
from maxlm.inference.engine import EngineConfig
from maxlm.serving.program import choose_max_length, warn_of_missing_kernels


def choose(max_seq_len: int, *settings: str) -> tuple[EngineConfig, EngineConfig]:
    """The settings before and after, for a model that was made for so many tokens."""
    config = load_config(EngineConfig, None, settings).value
    model: Any = SimpleNamespace(config=SimpleNamespace(max_seq_len=max_seq_len))
    return config, choose_max_length(config, model)


@pytest.mark.parametrize(
    ("max_seq_len", "settings", "expected"),
    [
        (8192, [], 8192),
        (8192, ["max_sequences=8", "page_size=64"], 8192),
        (8192, ["cache.kind=int8"], 8192),
        (512, [], 2048),  # RoPE goes on past a short model's end, as before
        (131_072, [], 16 * 2048),
        (131_072, ["num_pages=1001"], 16_000),
        (131_072, ["num_pages=20000"], 131_072),
        (8192, ["max_length=3000"], 3000),
        (8192, ["max_length=2048"], 2048),
    ],
)
def test_the_context_is_the_models_at_no_more_memory(
    max_seq_len, settings, expected, capsys
):
    before, after = choose(max_seq_len, *settings)
    assert after.max_length == expected
    # Pages, also those of layers with a window, are the cache's memory.
    assert after.count_pages((None, 100)) == before.count_pages((None, 100))
    assert after.num_pages is None or after.pages_per_sequence < after.num_pages
    is_cut = not any(setting.startswith("max_length") for setting in settings)
    is_cut &= 2048 < expected < max_seq_len
    line = capsys.readouterr().err
    assert line.count("\n") == int(is_cut)
    if is_cut:
        assert f"max_length is {expected}" in line
        assert "set max_length and num_pages for more" in line


def test_missing_kernels_are_said_in_one_line(
    one_device_mesh, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing compiled before
    monkeypatch.setattr(
        "maxlm.inference.cpu.load_library", library.load_library.__wrapped__
    )
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    warn_of_missing_kernels(one_device_mesh)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "no C++ compiler 'no-such-compiler'; install g++, or name one in CXX" in line
    monkeypatch.setenv("CXX", "true")
    warn_of_missing_kernels(one_device_mesh)
    assert capsys.readouterr().err == ""
