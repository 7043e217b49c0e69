"""Config machinery: a frozen base, YAML with includes, dotted overrides, readable errors."""

from maxlm.config.assets import asset, resolve_config, shipped_configs
from maxlm.config.base import Config, FileName, default_tag
from maxlm.config.compare import ABSENT, differences
from maxlm.config.errors import MaxlmError
from maxlm.config.keys import Origin
from maxlm.config.load import Loaded, load
from maxlm.config.local_path import LocalPath, check_local
from maxlm.config.show import schema, show, to_yaml

__all__ = [
    "ABSENT",
    "Config",
    "FileName",
    "Loaded",
    "LocalPath",
    "MaxlmError",
    "Origin",
    "asset",
    "check_local",
    "default_tag",
    "differences",
    "load",
    "resolve_config",
    "schema",
    "shipped_configs",
    "show",
    "to_yaml",
]
