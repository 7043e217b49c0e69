"""Promise: shipped files are found in a wheel and in the source tree, by short names
too."""

from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.config.assets import find_asset, list_shipped_configs, resolve_config


@pytest.fixture(params=["wheel", "source tree"])
def root(request, tmp_path, monkeypatch):
    """A pretended installation; the working directory is elsewhere and empty."""
    package = tmp_path / "lib" / "maxlm"
    root = package / "_assets" if request.param == "wheel" else package.parent
    for name in ("runs/demo", "runs/llama", "models/llama", "models/gpt2_small"):
        path = root / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    (root / "launch").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("maxlm.config.assets._PACKAGE", package)
    return root


def test_an_asset(root):
    assert find_asset("configs/runs/demo.yaml") == root / "configs/runs/demo.yaml"
    names = ["runs/demo", "runs/llama", "models/gpt2_small", "models/llama"]
    assert list_shipped_configs() == names


@pytest.mark.parametrize(
    ("name", "shipped"),
    [
        ("demo", "runs/demo"),
        ("configs/runs/demo.yaml", "runs/demo"),
        ("gpt2_small", "models/gpt2_small"),
        ("models/gpt2_small.yaml", "models/gpt2_small"),
        ("models/llama", "models/llama"),
    ],
)
def test_resolve_config(root, name, shipped):
    assert resolve_config(name) == root / "configs" / f"{shipped}.yaml"


def test_a_file_of_the_users_comes_before_a_shipped_one(root):
    Path("demo.yaml").write_text("")
    Path("runs").mkdir()
    assert resolve_config("demo.yaml") == Path("demo.yaml")
    assert resolve_config("demo") == root / "configs/runs/demo.yaml"
    Path("demo").mkdir()  # a folder of that name, say a run's, is no config
    assert resolve_config("demo") == root / "configs/runs/demo.yaml"


DID_YOU_MEAN = "no such file or shipped config; did you mean"
MISSING = {
    "demmo": f"{DID_YOU_MEAN} runs/demo?",
    "gpt2_smal.yaml": f"{DID_YOU_MEAN} models/gpt2_small?",
    "mine/rnu.yaml": f"{DID_YOU_MEAN} mine/run.yaml?",
    "zzz": "no such file or shipped config; see `maxlm config list`",
    "mine/": "a folder, not a config file; name a file in it",
}


@pytest.mark.parametrize("name", MISSING)
def test_no_such_config(root, name):
    Path("mine").mkdir()
    Path("mine/run.yaml").write_text("")
    with pytest.raises(MaxlmError) as caught:
        resolve_config(name)
    assert str(caught.value) == f"{name}: {MISSING[name]}"
