"""Config machinery: a frozen base, YAML with includes, dotted overrides, readable
errors."""

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

__all__ = [
    "Config",
    "FileName",
    "LocalPath",
    "MaxlmError",
    "SettingOrigin",
    "add_default_tag",
    "check_local_path",
    "check_path_is_text",
]
