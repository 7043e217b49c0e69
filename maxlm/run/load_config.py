"""Loads a run's config, whose model may be that of what it starts from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.config.assets import resolve_config
from maxlm.config.layers import build_tree
from maxlm.config.load import load_config, validate_config
from maxlm.config.yaml_text import dump_yaml, parse_yaml
from maxlm.run.config import RunConfig
from maxlm.runtime.json_types import JsonObject


def load_run_config(source: str, settings: Sequence[str] = ()) -> RunConfig:
    """Loads a run's config, as ``load_config`` does. What a ``model`` without a width
    leaves out is taken from the model of ``train.start_from``, a run's folder or a
    Hugging Face checkpoint's. Raises MaxlmError: anything wrong with the config or with
    that model; neither is there."""
    path = resolve_config(source)
    tree = build_tree(path, settings)
    train = tree.settings.get("train")
    model_settings = tree.settings.get("model") or {}
    start = train.get("start_from") if isinstance(train, Mapping) else None
    if not model_settings and start is None:
        fix = "name a run's or a Hugging Face folder: --base FOLDER, or train.start_from=FOLDER"
        raise MaxlmError("no model, and none to start from", where=source, fix=fix)
    if (
        isinstance(start, str)
        and isinstance(model_settings, Mapping)
        and "d_model" not in model_settings
    ):
        model = dump_yaml({"model": _read_model_settings(Path(start).expanduser())})
        tree = build_tree(path, settings, parse_yaml(model, start, track_lines=False))
    return validate_config(RunConfig, tree)


def _read_model_settings(folder: Path) -> JsonObject:
    if (folder / "config.yaml").exists():
        config = load_config(RunConfig, folder / "config.yaml").value
    elif folder.exists():
        from maxlm.run.convert import open_huggingface_model

        config = open_huggingface_model(folder, Path("runs", "base")).config
    else:
        fix = "name a run's folder, or a downloaded Hugging Face one"
        raise MaxlmError("no such folder", where=str(folder), fix=fix)
    return config.model.model_dump(mode="json")
