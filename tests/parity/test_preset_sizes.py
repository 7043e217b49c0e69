"""transformers, given a preset's config.json, builds a model of as many parameters."""

import re
import runpy
from pathlib import Path

import pytest

from maxlm.config import asset
from maxlm.models.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "parameter_counts.py"))
NAMES = [name for name in SCRIPT["PUBLISHED"] if name != "grok_1"]  # which it does not have


@pytest.mark.parametrize("name", NAMES)
def test_as_many_parameters(name):
    text = asset(f"configs/models/{name}.yaml").read_text()
    count = re.search(r"([\d,]+) parameters", text)
    assert count is not None
    family = FAMILIES[SCRIPT["family"](name)]
    values = family.config_json(SCRIPT["preset"](name))
    model = getattr(transformers, values.pop("architectures")[0])
    config = model.config_class(**values)
    assert config.model_type == family.model_type
    with torch.device("meta"):  # nothing is allocated
        parameters = list(model(config).parameters())
    assert sum(p.numel() for p in parameters) == int(count[1].replace(",", ""))
