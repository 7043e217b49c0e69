"""JSON as Python has it."""

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
"""An object of JSON; its values are whatever JSON has, to be checked where they are
read."""
JsonMapping = Mapping[str, Any]
"""The same, to be read alone."""
