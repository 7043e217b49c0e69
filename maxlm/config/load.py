"""Loads a YAML file and overrides into a checked, frozen config."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from maxlm.config.assets import resolve_config
from maxlm.config.base import Config
from maxlm.config.explain import describe_validation_error
from maxlm.config.keys import DEFAULT, SettingOrigin, flatten, join_key
from maxlm.config.layers import SettingsTree, build_tree

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class LoadedConfig(Generic[C]):
    """A config and where each of its values comes from."""

    value: C
    origins: Mapping[str, SettingOrigin]
    """Origin of each leaf, by dotted key (``data.sources.0.weight``): file and line,
    command line, default, or another setting that changed it."""


def load_config(
    cls: type[C], source: Path | str | None, overrides: Sequence[str] = ()
) -> LoadedConfig[C]:
    """Reads a config.

    Mappings merge deeply; lists are replaced whole. From lowest to highest: the
    defaults of `cls`, each file under ``include:`` in order, the file itself, the
    overrides in order.

    Args:
        cls: the config class to check against.
        source: a file; as text also the name of a shipped config (see
            `resolve_config`); None for overrides alone.
        overrides: ``key.path=value`` with the value in YAML; an element of a list is
            ``data.sources.0.weight`` or ``data.sources[0].weight``.

    Raises:
        MaxlmError: anything wrong with the files, the overrides or the values.
    """
    path = resolve_config(source) if isinstance(source, str) else source
    tree = build_tree(path, overrides)
    config = validate_config(cls, tree)
    origins = {}
    for key, value in flatten(config.model_dump(mode="json")):
        if key:  # A config without fields is one leaf, of the empty key.
            origins[join_key(key)] = tree.find_value_origin(key, value) or DEFAULT
    return LoadedConfig(config, origins)


def validate_config(cls: type[C], tree: SettingsTree) -> C:
    """Checks plain settings against `cls`."""
    try:
        return cls.model_validate(tree.settings, context={"locate": True})
    except ValidationError as error:
        raise describe_validation_error(error, cls, tree) from None
