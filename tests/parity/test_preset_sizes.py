"""transformers, given a preset's config.json, builds a model of as many parameters."""

import re
import runpy
from pathlib import Path

import pytest

from maxlm.config import find_asset
from maxlm.models.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "parameter_counts.py"))
NAMES = [name for name in SCRIPT["PUBLISHED"] if name != "grok_1"]  # which it does not have
COUNTED_BUFFERS = {"final_logits_bias"}  # BART's: zeros, which its published code never trains


@pytest.mark.parametrize("name", NAMES)
def test_as_many_parameters(name):
    text = find_asset(f"configs/models/{name}.yaml").read_text()
    count = re.search(r"([\d,]+) parameters", text)
    assert count is not None
    family = FAMILIES[SCRIPT["family"](name)]
    values = family.write_config(SCRIPT["preset"](name))
    model = getattr(transformers, values.pop("architectures")[0])
    config = model.config_class(**values)
    assert config.model_type == family.model_type
    with torch.device("meta"):  # nothing is allocated
        made = model(config)
        if config.tie_word_embeddings and values.get("tie_word_embeddings") is False:
            # The library's T5 parts head and table when it loads weights that differ.
            made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.clone())
    held = [*made.parameters(), *(b for n, b in made.named_buffers() if n in COUNTED_BUFFERS)]
    assert sum(p.numel() for p in held) == int(count[1].replace(",", ""))
