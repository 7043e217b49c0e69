r"""References between settings: ``${key.path}`` stands for the value of another key.

Nothing else is filled in, the environment least of all: a config may be another's, and what it
resolves to is printed into jobs and kept with runs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from maxlm.config.errors import MaxlmError
from maxlm.config.keys import Key, SettingOrigin, format_value, get_child, join_key, split_key
from maxlm.config.yaml_text import SizeLimit

# Pairs of backslashes, which stand for one each, before an escaped or a true reference.
_REFERENCE = re.compile(r"(?<!\\)((?:\\\\)*)(?:(\\\$\{)|\$\{([^}]*)(\}?))")


def is_reference(node: Any) -> bool:
    """Returns whether a value stands for another, in whole or in part."""
    return isinstance(node, str) and "${" in node


@dataclass
class ReferenceResolver:
    """Replaces the references in plain settings by what they stand for."""

    settings: dict[str, Any]
    locate: Callable[[Key], SettingOrigin]
    size: SizeLimit = field(default_factory=SizeLimit)

    def expand(self, node: Any, key: Key = (), depth: int = 0) -> Any:
        """Return the value that stands at `key`, its references replaced.

        Raises:
            MaxlmError: a reference that is none, leads nowhere, in a circle or to too much; a
                value left open.
        """
        self.size.add(node, depth, self.locate(key), key)
        if isinstance(node, dict):
            return {k: self.expand(v, (*key, k), depth + 1) for k, v in node.items()}
        if isinstance(node, list):
            return [self.expand(v, (*key, i), depth + 1) for i, v in enumerate(node)]
        if node == "???":
            raise self._error(key, "left open (???)", f"set {join_key(key)}")
        if not is_reference(node):
            return node
        whole = _REFERENCE.fullmatch(node)
        if whole and not whole[1] and not whole[2]:
            return self._look_up(whole, key, depth)
        text = _REFERENCE.sub(lambda found: self._fill(found, key, depth), node)
        self.size.add(text, depth, self.locate(key), key)
        return text

    def _fill(self, found: re.Match[str], key: Key, depth: int) -> str:
        value = "${" if found[2] else self._look_up(found, key, depth)
        if isinstance(value, dict | list):
            raise self._error(key, f"${{{found[3]}}} is no text", "name one value inside it")
        return found[1][::2] + (value if isinstance(value, str) else format_value(value))

    def _look_up(self, found: re.Match[str], key: Key, depth: int) -> Any:
        name = f"${{{found[3][:60]}{found[4]}"
        if ":" in found[3]:
            fix = f'pass {join_key(key)}="$VARIABLE" on the command line, where the shell fills it'
            raise self._error(key, f"{name} is not filled in, only ${{key.path}} is", fix)
        parts = split_key(found[3]) if found[4] else None
        if parts is None:
            raise self._error(key, f"bad reference {name}", r"for a plain ${ write \${")
        node, target, expanded = self.settings, (), False
        for part in parts:
            if is_reference(node):
                node, expanded = self.expand(node, target, depth + 1), True
            listed = isinstance(node, list)
            step = int(part) if listed and part.isdecimal() else part
            if step not in (range(len(node)) if listed else node if isinstance(node, dict) else ()):
                fix = "write that key too: references see what is written, not the defaults"
                raise self._error(key, f"{name} names no key that is written", fix)
            node, target = get_child(node, step), (*target, step)
        return node if expanded else self.expand(node, target, depth + 1)

    def _error(self, key: Key, what: str, fix: str | None) -> MaxlmError:
        return MaxlmError(f"{join_key(key)}: {what}", where=str(self.locate(key)), fix=fix)
