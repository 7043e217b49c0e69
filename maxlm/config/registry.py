"""Kinds of a thing by name, and settings that name a kind."""

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError, core_schema

from maxlm.config.base import Config
from maxlm.config.errors import MaxlmError

T = TypeVar("T")


class Registry(Generic[T]):
    """The kinds of one thing, such as tasks or optimizers, by name.

    A kind is built in, registered by a program (:meth:`register`), or declared by an
    installed package as an entry point, whose name is the kind, of the group that
    :attr:`group` names. Built-in kinds and those of packages are imported when they are
    first asked for, so that a program loads only what it uses.

    Args:
        role: the thing's name in messages, such as ``corpus stage``.
        builtin: each built-in kind as ``package.module:attribute``.
        plural: the role of several, for the group of entry points; default: with an s.
    """

    def __init__(
        self,
        role: str,
        builtin: Mapping[str, str] | None = None,
        *,
        plural: str | None = None,
    ):
        self.role = role
        self.group = f"maxlm.{(plural or f'{role}s').replace(' ', '_')}"
        self._builtin = {
            kind: EntryPoint(kind, source, self.group)
            for kind, source in (builtin or {}).items()
        }
        self._loaded: dict[str, T] = {}

    def register(self, kind: str, value: T | None = None) -> Any:
        """Makes a kind known; without ``value``, as a decorator. A kind that is
        registered again is replaced, also a built-in one."""
        if value is not None:
            self._loaded[kind] = value
            return value

        def decorate(decorated: T) -> T:
            self._loaded[kind] = decorated
            return decorated

        return decorate

    def builtin_kinds(self) -> list[str]:
        """Returns the names of the kinds that maxlm has: those that it names here, and
        those that a room further up declares as an entry point, as packages do."""
        declared = [
            entry.name
            for entry in entry_points(group=self.group)
            if entry.dist is not None and entry.dist.name == "maxlm"
        ]
        return list(dict.fromkeys([*self._builtin, *declared]))

    def kinds(self) -> list[str]:
        """Returns the names of all kinds, built-in ones first; imports none."""
        return list(self._iterate_kinds())

    def find(self, kind: str) -> T | None:
        """Returns a kind; None: there is none of that name."""
        if kind in self._loaded:
            return self._loaded[kind]
        source = self._builtin.get(kind)
        if source is None:
            source = next(iter(entry_points(group=self.group, name=kind)), None)
        if source is None:
            return None
        value = source.load()
        # A module that is imported may register its kind itself.
        return self._loaded.setdefault(kind, value)

    def get(self, kind: str, *, setting: str = "kind") -> T:
        """Returns a kind. Raises MaxlmError, with near names: there is none of that
        name."""
        value = self.find(kind)
        if value is None:
            raise MaxlmError(
                f"no {self.role} of {setting}={kind}", fix=self.suggest(kind)
            )
        return value

    def suggest(self, kind: str) -> str:
        """Returns what to do about the name of a kind that there is not."""
        kinds = self.kinds()
        near = get_close_matches(kind, kinds, n=1)
        if near:
            return f"did you mean {near[0]}?"
        if kinds:
            return f"use one of {', '.join(kinds)}"
        return "install the package that has it"

    def items(self) -> Iterator[tuple[str, T]]:
        """Yields all kinds, each of which is imported."""
        for kind in self._iterate_kinds():
            value = self.find(kind)
            assert value is not None
            yield kind, value

    def _iterate_kinds(self) -> Iterator[str]:
        known = list(dict.fromkeys([*self._builtin, *self._loaded]))
        yield from known
        # Last: all installed packages are looked through, which takes 20 ms.
        for entry in entry_points(group=self.group):
            if entry.name not in known:
                yield entry.name


class RegisteredConfig:
    """Annotates a setting whose value is the config of a registered kind.

    ``Annotated[Task, RegisteredConfig(TASKS, Task, default="clm")]`` reads a mapping as
    the config that its tag names, keeps an object as it is, and writes all settings of
    the kind. Errors and JSON schema are those of a discriminated union of all kinds.

    Args:
        registry: the kinds.
        base: what the configs of all kinds are.
        tag: the key that names the kind.
        default: the kind of a mapping that names none; None: it must name one.
        get_config: the class of a registered kind's config; default: the kind itself.
            A class without the tag is no choice: it has a setting of its own.
    """

    def __init__(
        self,
        registry: Registry[Any],
        base: type[Config] = Config,
        *,
        tag: str = "kind",
        default: str | None = None,
        get_config: Callable[[Any], type[Config]] = lambda registered: registered,
    ):
        self.registry = registry
        self.base = base
        self.tag = tag
        self.default = default
        self._get_config = get_config
        self._is_described = False
        """Whether the JSON schema of all kinds is being made."""

    def select_types(self, settings: object) -> list[type[Config]]:
        """Returns the class that settings name, or all classes if they name none."""
        if isinstance(settings, Mapping):
            config = self._find_config(settings.get(self.tag, self.default))
            if config is not None:
                return [config]
        return list(dict.fromkeys(self._list_choices().values()))

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choices = self._list_choices()
        if not choices or self._is_described:
            return {"type": "object"}
        # A kind may hold another of the registry (heads beside another mixer): within
        # itself it is any object.
        self._is_described = True
        try:
            return self._describe_choices(choices, handler)
        finally:
            self._is_described = False

    def _describe_choices(
        self, choices: Mapping[str, type[Config]], handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schemas = {
            kind: config.__pydantic_core_schema__ for kind, config in choices.items()
        }
        if len(set(choices.values())) == 1:
            # All kinds have the same settings: one class, whatever its kind.
            return handler(core_schema.union_schema([next(iter(schemas.values()))]))
        return handler(core_schema.tagged_union_schema(schemas, discriminator=self.tag))

    def _find_config(self, kind: object) -> type[Config] | None:
        registered = self.registry.find(kind) if isinstance(kind, str) else None
        if registered is None:
            return None
        config = self._get_config(registered)
        return config if self.tag in config.model_fields else None

    def _list_choices(self) -> dict[str, type[Config]]:
        choices: dict[str, type[Config]] = {}
        for kind in self.registry.kinds():
            config = self._find_config(kind)
            if config is not None:
                choices[kind] = config
        return choices

    def _validate(self, value: object, info: ValidationInfo) -> Config:
        if isinstance(value, self.base):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "model_type", "Input should be a valid dictionary or object"
            )
        settings = dict(value)
        if self.default is not None:
            settings.setdefault(self.tag, self.default)
        kind = settings.get(self.tag)
        tag = f"'{self.tag}'"
        if kind is None:
            message = "Unable to extract tag using discriminator {discriminator}"
            details = {"discriminator": tag, "kinds": self.registry.kinds()}
            raise PydanticCustomError("union_tag_not_found", message, details)
        config = self._find_config(kind)
        if config is None:
            message = "Input tag {tag} found using {discriminator} does not match any"
            kinds = self.registry.kinds()
            details = {"discriminator": tag, "tag": kind, "kinds": kinds}
            raise PydanticCustomError("union_tag_invalid", message, details)
        return config.model_validate(settings, context=info.context)
