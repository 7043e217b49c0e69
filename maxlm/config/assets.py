"""The files that come with maxlm: configs/ (presets and recipes) and launch/
(templates)."""

from difflib import get_close_matches
from pathlib import Path

from maxlm.config.errors import MaxlmError

_PACKAGE = Path(__file__).resolve().parents[1]
# Of configs/, in the order in which a bare name is looked up.
_FOLDERS = ("runs", "tune", "methods", "models")


def find_asset(relative: str) -> Path:
    """Returns a shipped file or folder, such as ``configs/runs/demo.yaml`` or
    ``launch``, from where an installed wheel keeps it, else from the source tree that
    maxlm runs from."""
    installed = _PACKAGE / "_assets"
    return (installed if installed.is_dir() else _PACKAGE.parent) / relative


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
    names = {stem, *(f"{folder}/{stem}" for folder in _FOLDERS)}
    found = next((name for name in list_shipped_configs() if name in names), None)
    return find_asset("configs") / f"{found}.yaml" if found else None


def resolve_config(name: str) -> Path:
    """Returns the config file a user means: an existing file, else a shipped config by
    name.

    A bare name is looked up among the recipes (configs/runs, tune, methods), then the
    presets (configs/models); ``.yaml`` may be left out.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    found = None if name.endswith(("/", ".")) else find_shipped_config(name)
    if found is not None:
        return found
    if path.is_dir():
        raise MaxlmError(
            "a folder, not a config file", where=name, fix="name a file in it"
        )
    near = find_similar_configs(path)
    fix = f"did you mean {', '.join(near)}?" if near else "see `maxlm config list`"
    raise MaxlmError("no such file or shipped config", where=name or "''", fix=fix)


def find_similar_configs(path: Path) -> list[str]:
    """Returns up to three shipped names and neighbouring files that read like
    `path`."""
    stem = path.name.removesuffix(path.suffix)
    by_stem = {
        name.rsplit("/", 1)[-1]: name for name in reversed(list_shipped_configs())
    }
    if path.parent.is_dir():
        by_stem |= {file.stem: str(file) for file in sorted(path.parent.glob("*.y*ml"))}
    return [by_stem[match] for match in get_close_matches(stem, by_stem, n=3)]
