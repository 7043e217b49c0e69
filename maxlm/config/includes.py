"""A config file and the files it includes, as documents to lay over one another."""

import os
from pathlib import Path

from maxlm.config.assets import find_shipped_config, find_similar_configs
from maxlm.config.errors import MaxlmError
from maxlm.config.keys import SettingOrigin, format_path, format_value
from maxlm.config.yaml_text import SizeLimit, YamlDocument, parse_yaml


def read_documents(
    path: Path, trail: tuple[Path, ...] = (), size: SizeLimit | None = None
) -> list[YamlDocument]:
    """Returns the documents that make up `path`, lowest first: its includes in order, then itself.

    ``include:`` at the top of a file is a path or a list of paths, each relative to that file, or
    the name of a shipped config.

    Args:
        trail: the files that led here, to find a cycle.
        size: counts what all of them come to.

    Raises:
        MaxlmError: a file that is missing, unreadable, not a YAML mapping, or includes itself.
    """
    size = size or SizeLimit()
    size.num_values += 200  # A file costs more to read than what it holds.
    size.add(None, 0, SettingOrigin(format_path(path)), ())
    document = read_document(path, size)
    settings = dict(document.data)
    include = settings.pop("include", [])
    trail = (*trail, path)
    documents = []
    for index, name in enumerate(include if isinstance(include, list) else [include]):
        origin = document.origins.get(("include", index)) or document.origins[("include",)]
        if not isinstance(name, str):
            what = f"include must be a path or a list of paths, not {format_value(name)}"
            raise MaxlmError(what, where=str(origin))
        target = _included(path, name, origin)
        if target.resolve() in [earlier.resolve() for earlier in trail]:
            ring = " -> ".join(format_path(step) for step in (*trail, target))
            what = f"include cycle: {ring}"
            raise MaxlmError(what, where=str(origin), fix="remove one of these includes")
        documents += read_documents(target, trail, size)
    origins = {key: at for key, at in document.origins.items() if key[:1] != ("include",)}
    return [*documents, YamlDocument(settings, origins)]


def read_document(path: Path, size: SizeLimit | None = None) -> YamlDocument:
    """Reads one YAML file, whose top must be a mapping; an empty file is an empty mapping.

    Raises:
        MaxlmError: unreadable, not UTF-8, not YAML, or not a mapping.
    """
    name = format_path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MaxlmError(f"cannot be read: {error.strerror}", where=name) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 text (byte 0x{error.object[error.start]:02x})"
        raise MaxlmError(what, where=f"{name}:{line}", fix="save it as UTF-8") from None
    document = parse_yaml(text, name, size=size)
    if document.data is not None and not isinstance(document.data, dict):
        what = "a config must be a mapping of keys to values"
        raise MaxlmError(what, where=str(document.origins[()]))
    return YamlDocument(document.data or {}, {**document.origins, (): SettingOrigin(name)})


def _included(includer: Path, name: str, origin: SettingOrigin) -> Path:
    path = Path(os.path.normpath(includer.parent / Path(name).expanduser()))
    if path.is_file():
        return path
    shipped = find_shipped_config(name)
    if shipped is not None:
        return shipped
    near = find_similar_configs(path)
    fix = f"did you mean {' or '.join(near)}?" if near else None
    raise MaxlmError(
        f"include {name!r}: there is no {format_path(path)}", where=str(origin), fix=fix
    )
