"""Config machinery: a frozen base, YAML with includes, dotted overrides, readable
errors."""

from maxlm.config.assets import find_asset, list_shipped_configs
from maxlm.config.base import (
    Config,
    FileName,
    LocalPath,
    add_default_tag,
    check_local_path,
    check_path_is_text,
)
from maxlm.config.errors import MaxlmError
from maxlm.config.keys import SettingOrigin
from maxlm.config.load import load_config
from maxlm.config.show import (
    ABSENT,
    build_json_schema,
    compare_configs,
    to_annotated_yaml,
    to_yaml,
)

__all__ = [
    "ABSENT",
    "Config",
    "FileName",
    "LocalPath",
    "MaxlmError",
    "SettingOrigin",
    "add_default_tag",
    "build_json_schema",
    "check_local_path",
    "check_path_is_text",
    "compare_configs",
    "find_asset",
    "list_shipped_configs",
    "load_config",
    "to_annotated_yaml",
    "to_yaml",
]
