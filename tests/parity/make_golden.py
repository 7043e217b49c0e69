"""Write tests/models/golden: each case's weights in bf16, and the logits that the other
implementation computes from them in fp32. ``python -m tests.parity.make_golden [CASE
...]``"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.parity import compare, measure

FOLDER = Path(__file__).parents[1] / "models" / "golden"
# What says which library wrote a config.json, not what the model computes.
LEFT_OUT = ("transformers_version", "id2label", "label2id")

DECAYS = ("query_decay", "key_decay", "diagonal_decay")


def main(names: tuple[str, ...]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names or measure.CASES:
        write(name, FOLDER / f"{name}.safetensors")


def write(name: str, path: Path) -> None:
    model = measure.build(name)
    with torch.no_grad():
        for parameter in model.state_dict().values():
            parameter.copy_(parameter.to(torch.bfloat16))
        for module in model.modules():
            # MiniMax's tables follow from its slopes, which are rounded now.
            if hasattr(module, "decay_factors"):
                tables = module.decay_factors(module.slope_rate)
                for key, table in zip(DECAYS, tables, strict=True):
                    getattr(module, key).copy_(table)
    whole = measure.batch(name)
    row = measure.Batch(*(None if x is None else x[:1] for x in whole))
    shown = {
        key: x.astype(np.int32) for key, x in row._asdict().items() if x is not None
    }
    shown["logits"] = measure.theirs(model, row)
    with TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "model.safetensors")
    family = measure.case(name).family
    tensors = compare.spell_as_published(family, tensors, tensors)
    tensors |= {f"golden.{key}": torch.from_numpy(x.copy()) for key, x in shown.items()}
    saved_config = {key: value for key, value in config.items() if key not in LEFT_OUT}
    save_file(tensors, path, {"config": json.dumps(saved_config, sort_keys=True)})


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
