"""The base of every component's config, and types of settings."""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, LiteralString, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    WrapValidator,
)
from pydantic_core import PydanticCustomError, core_schema

from maxlm.config.errors import MaxlmError

_Path = TypeVar("_Path", bound=str | Path)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_COPY_TOOLS = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r"}
# Of the 255 that file systems take: temporary names are longer than the final ones.
_MAX_NAME_BYTES = 200
_SCALARS: dict[str, LiteralString] = {
    "int": "Input should be an integer",
    "float": "Input should be a number",
    "bool": "Input should be true or false",
}
# Entries of a core schema whose values are data, not schemas inside it.
_DATA_KEYS = ("default", "expected", "metadata", "serialization")


# A core schema is a union of some fifty TypedDicts, too many to walk over by type.
def _check_scalars(schema: Any) -> Any:
    """Return a core schema that takes no boolean for a number, no number for a boolean
    and no integer of more than 64 bits, at any depth."""
    if isinstance(schema, list | tuple):
        return type(schema)(_check_scalars(item) for item in schema)
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    # Else a mapping of names to schemas, whose names may be such as "default".
    is_schema = isinstance(kind, str)
    if is_schema and kind in _SCALARS:
        return _wrap_scalar(cast(core_schema.CoreSchema, schema), kind)
    checked = {}
    for key, part in schema.items():
        is_data = is_schema and key in _DATA_KEYS
        checked[key] = part if is_data else _check_scalars(part)
    return checked


def _wrap_scalar(schema: core_schema.CoreSchema, kind: str) -> core_schema.CoreSchema:
    """The schema of an int, float or bool, with the checks of `_check_scalars`."""

    def check(value: object, validate: Callable[[object], Any]) -> Any:
        is_number = isinstance(value, int | float)  # a boolean is an int to Python
        if is_number and isinstance(value, bool) != (kind == "bool"):
            raise PydanticCustomError("scalar_type", _SCALARS[kind])
        checked = validate(value)
        if kind == "int" and not -(2**63) <= checked < 2**63:
            raise PydanticCustomError(
                "int_size", "Input should be an integer of 64 bits"
            )
        return checked

    return core_schema.no_info_wrap_validator_function(check, schema)


def _locate_error(
    settings: object, validate: Callable[[object], Any], info: ValidationInfo
) -> Any:
    """Turn a check's `MaxlmError` into pydantic's, which knows the key, for
    `load_config`."""
    try:
        return validate(settings)
    except MaxlmError as error:
        # Without a context it is not `load_config` that validates.
        if not info.context:
            raise
        raise PydanticCustomError("maxlm_error", "{error}", {"error": error}) from None


class Config(BaseModel):
    """A frozen, strictly checked description of one component.

    Unknown keys are errors. Booleans are no numbers and numbers no booleans, and
    integers have 64 bits. A docstring under a field is its documentation: it reaches
    ``maxlm config schema`` and so the user's editor.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        schema = handler(source)
        model = cast(dict[str, Any], handler.resolve_ref_schema(schema))
        inner = _check_scalars(model)
        # The wrapper takes the model's place, in the same dict, so that all references
        # to the model mean the wrapper.
        ref = inner.pop("ref", None)
        wrapped = core_schema.with_info_wrap_validator_function(_locate_error, inner)
        if ref:
            wrapped["ref"] = ref
        model.clear()
        model.update(wrapped)
        return schema

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = handler(core)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        config_classes = cls.__mro__[: cls.__mro__.index(BaseModel)]
        for model in config_classes:
            for name, text in _parse_field_docstrings(model).items():
                properties.get(name, {}).setdefault("description", text)
        return schema


@cache
def _parse_field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings under a model's own fields. Pydantic's
    ``use_attribute_docstrings`` would read every source file when a verb starts."""
    source = dedent(inspect.getsource(model))
    definition = cast(ast.ClassDef, ast.parse(source).body[0])
    docstrings = {}
    for pair in pairwise(definition.body):
        match pair:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                docstrings[name] = inspect.cleandoc(text)
    return docstrings


def add_default_tag(name: str, value: str) -> BeforeValidator:
    """Adds the key ``name`` where a mapping lacks it, for a union discriminated by
    it."""

    def add_tag(settings: object) -> object:
        if isinstance(settings, Mapping) and name not in settings:
            return {name: value, **settings}
        return settings

    return BeforeValidator(add_tag)


def _check_file_name(text: str) -> str:
    for part in text.split("/"):
        if not part or part[0] in ".- " or not part.isprintable() or "\\" in part:
            raise ValueError(
                f"{text[:60]!r} names no folder; write a plain name such as my_run-2: "
                "nothing before a slash or behind it may be empty or begin with a dot, "
                "a dash or a space"
            )
    if len(text.encode()) > _MAX_NAME_BYTES:
        raise ValueError(
            f"{text[:60]!r}... is too long for a folder; "
            f"use {_MAX_NAME_BYTES} bytes at most"
        )
    return text


FileName = Annotated[str, AfterValidator(_check_file_name)]
"""A relative path without ``..`` or hidden parts: joined to a folder, it stays inside
it."""


def check_local_path(path: _Path) -> _Path:
    """Return a path as it is; refuse a URL, for which a folder such as `s3:` would be
    made."""
    # One slash is enough: a Path has made one of two.
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(path))
    if url:
        scheme, rest = url.groups()
        message = (
            f"{scheme}://{rest} is not on a disk; only a token store to read and "
            "checkpoint.remote_folder may be URLs"
        )
        tool = _COPY_TOOLS.get(scheme, "a tool of its own")
        raise MaxlmError(message, fix=f"use a folder here, and copy it with {tool}")
    return path


def check_path_is_text(path: _Path) -> _Path:
    """Return a path as it is; refuse one that holds a NUL or a lone surrogate.

    Python keeps a byte of the command line that is no UTF-8 as the latter. Files under
    such names can be read, but libraries write none, and no config can say the name
    again.
    """
    if _NO_TEXT.search(str(path)):
        message = f"the path {str(path)[:60]!r} is no text in UTF-8"
        raise MaxlmError(message, fix="name another")
    return path


LocalPath = Annotated[
    str,
    AfterValidator(check_path_is_text),
    AfterValidator(check_local_path),
    WrapValidator(_locate_error),
]
"""A path in a config, which must lie on a disk."""
