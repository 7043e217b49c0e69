"""Published models' config.json, and tiny models of every family with the logits that
another implementation computes from them: tests/parity/make_golden.py writes those."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
_PREFIX = "golden."


def read_models(path: Path) -> dict[str, dict[str, Any]]:
    """Return a file's ``models`` by name, each with the values of its ``base``."""
    tree = yaml.safe_load(path.read_text())

    def resolve(values: dict[str, Any]) -> dict[str, Any]:
        resolved = dict(values)
        base = resolved.pop("base", None)
        return {**(resolve(tree["bases"][base]) if base else {}), **resolved}

    return {name: resolve(values) for name, values in tree["models"].items()}


PUBLISHED = read_models(Path(__file__).parent / "published_configs.yaml")
"""The config.json of each preset's model, and of a few without one."""
COUNTS: dict[str, tuple[int, int]] = {}
for _name, _values in PUBLISHED.items():
    _count = _values.pop("parameters", None)
    if _count:
        COUNTS[_name] = (_count, _values.pop("active", _count))
"""Each preset's parameters, and those that a token meets, as published with the
weights."""


class Golden(NamedTuple):
    values: dict[str, Any]
    """config.json."""
    tensors: dict[str, np.ndarray]
    """bf16, as model.safetensors has them."""
    shown: dict[str, np.ndarray]
    """int32 [1, S]: ``tokens``, maybe ``types``, maybe an encoder's ``source``."""
    logits: np.ndarray
    """fp32 [1, S, V]."""


@cache
def golden(name: str) -> Golden:
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, "np") as file:
        values = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    extra = [key for key in tensors if key.startswith(_PREFIX)]
    shown = {key.removeprefix(_PREFIX): tensors.pop(key) for key in extra}
    return Golden(values, tensors, shown, shown.pop("logits"))


def folder_of(name: str, folder: Path, tensors: Any = None, **values: Any) -> Path:
    """A case as a Hugging Face folder.

    Args:
        tensors: others than its own.
        values: of config.json, besides its own or instead.
    """
    case = golden(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case.values | values))
    save_file(
        case.tensors if tensors is None else tensors, folder / "model.safetensors"
    )
    return folder
