"""The files that come with maxlm: configs/ (presets and recipes) and launch/
(templates)."""

from difflib import get_close_matches
from pathlib import Path

from maxlm.config.errors import MaxlmError

_PACKAGE = Path(__file__).resolve().parents[1]
# Of configs/, in the order in which a bare name is looked up.
_FOLDERS = ("runs", "tune", "rl", "methods", "models")


def find_asset(relative: str) -> Path:
    """Returns a shipped file or folder, such as ``configs/runs/demo.yaml`` or
    ``launch``, from where an installed wheel keeps it, else from the source tree that
    maxlm runs from."""
    installed = _PACKAGE / "_assets"
    root = installed if installed.is_dir() else _PACKAGE.parent
    return root / relative


def list_shipped_configs() -> list[str]:
    """Returns names of the shipped configs, recipes first: ``runs/demo``,
    ``models/llama3_8b``; those in ``methods/`` take their model from the one they
    tune."""
    root = find_asset("configs")
    return [
        str(path.relative_to(root).with_suffix("").as_posix())
        for folder in _FOLDERS
        for path in sorted((root / folder).rglob("*.yaml"))
    ]


def find_shipped_config(name: str) -> Path | None:
    """Returns the shipped config named ``demo``, ``runs/demo`` or
    ``configs/runs/demo.yaml``."""
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    candidates = {stem, *(f"{folder}/{stem}" for folder in _FOLDERS)}
    for shipped in list_shipped_configs():
        if shipped in candidates:
            return find_asset("configs") / f"{shipped}.yaml"
    return None


def resolve_config(name: str) -> Path:
    """Returns the config file a user means: an existing file, else a shipped config by
    name.

    A bare name is looked up among the recipes (configs/runs, tune, rl, methods), then the
    presets (configs/models); ``.yaml`` may be left out.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    # Such a name is a folder's, not that of a config whose suffix was left out.
    if not name.endswith(("/", ".")):
        shipped = find_shipped_config(name)
        if shipped is not None:
            return shipped
    if path.is_dir():
        raise MaxlmError(
            "a folder, not a config file", where=name, fix="name a file in it"
        )
    similar = find_similar_configs(path)
    fix = "see `maxlm config list`"
    if similar:
        fix = f"did you mean {', '.join(similar)}?"
    raise MaxlmError("no such file or shipped config", where=name or "''", fix=fix)


def find_similar_configs(path: Path) -> list[str]:
    """Returns up to three shipped names and neighbouring files that read like
    `path`."""
    stem = path.name.removesuffix(path.suffix)
    name_by_stem: dict[str, str] = {}
    # Reversed, so that of equal stems the first in order of lookup stays.
    for name in reversed(list_shipped_configs()):
        name_by_stem[name.rsplit("/", 1)[-1]] = name
    if path.parent.is_dir():
        for file in sorted(path.parent.glob("*.y*ml")):
            name_by_stem[file.stem] = str(file)
    return [name_by_stem[stem] for stem in get_close_matches(stem, name_by_stem, n=3)]
