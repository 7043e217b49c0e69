"""Adapters of other folders, read to be used beside a model."""

from pathlib import Path

from maxlm.adapters import LoraAdapter
from maxlm.config import MaxlmError
from maxlm.huggingface.peft import CONFIG, read_peft_adapter
from maxlm.inference.adapter_slots import LoraWeights
from maxlm.models.architectures import Model
from maxlm.models.families import find_family
from maxlm.models.families.family import ModelFamily
from maxlm.models.params import param_specs, select_base_params
from maxlm.programs.convert import choose_family, open_run_checkpoint, read_json
from maxlm.train.checkpoint.reading import read_metadata


def read_lora_adapter(folder: str | Path, *, base_folder: str | Path, model: Model) -> LoraWeights:
    """Reads a LoRA adapter, from a folder of PEFT's or a run that trained one.

    Args:
        base_folder: where the model came from, which says how PEFT names its maps.

    Raises:
        MaxlmError: no LoRA adapter here, or PEFT's of another model.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        specs = select_base_params(param_specs(model))
        entries = _find_family(Path(base_folder), model).list_entries(model.config)
        adapter, arrays = read_peft_adapter(folder, model.config, specs, entries)
    elif (folder / "config.yaml").exists():
        config, reader = open_run_checkpoint(folder, None)
        parts = (".lora_a", ".lora_b")
        adapter = config.adapter
        arrays = {n: reader.open(n).read() for n in reader.shapes if n.endswith(parts)}
    else:
        what, fix = f"neither {CONFIG} nor config.yaml here", "name PEFT's folder, or a run's"
        raise MaxlmError(what, where=str(folder), fix=fix)
    if not isinstance(adapter, LoraAdapter):
        what = f"adapter.kind={adapter.kind}" if adapter else "a run without an adapter"
        fix = "name one of kind lora; others are merged (maxlm convert)"
        raise MaxlmError(f"{what} is not loaded beside a model", where=str(folder), fix=fix)
    return adapter, arrays


def _find_family(base_folder: Path, model: Model) -> ModelFamily:
    if (path := base_folder / "config.json").exists():
        return find_family(read_json(path), str(path))
    _, reader = open_run_checkpoint(base_folder, None)
    published = read_metadata(reader.folder).get("published") or {}
    return choose_family(model.config, published.get("family"))
