"""The base of every component's config, and types of settings."""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationInfo,
    WrapValidator,
)
from pydantic_core import PydanticCustomError, core_schema

from maxlm.config.errors import MaxlmError

_Path = TypeVar("_Path", bound=str | Path)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_TOOLS = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r"}
_SCALARS: dict[str, Any] = {
    "int": "Input should be an integer",
    "float": "Input should be a number",
    "bool": "Input should be true or false",
}


def _check_scalars(schema: Any) -> Any:
    """Return a core schema that takes no boolean for a number, no number for a boolean
    and no integer of more than 64 bits, at any depth."""
    if isinstance(schema, list | tuple):
        return type(schema)(_check_scalars(item) for item in schema)
    if not isinstance(schema, dict):
        return schema
    kind: Any = schema.get("type")
    if isinstance(kind, str) and kind in _SCALARS:

        def check(value: Any, validate: Callable[[Any], Any]) -> Any:
            if isinstance(value, int | float) and isinstance(value, bool) != (
                kind == "bool"
            ):
                raise PydanticCustomError("scalar_type", _SCALARS[kind])
            found = validate(value)
            if kind == "int" and not -(2**63) <= found < 2**63:
                raise PydanticCustomError(
                    "int_size", "Input should be an integer of 64 bits"
                )
            return found

        scalar: Any = schema
        return core_schema.no_info_wrap_validator_function(check, scalar)
    data = (
        ("default", "expected", "metadata", "serialization")
        if isinstance(kind, str)
        else ()
    )
    return {
        key: part if key in data else _check_scalars(part)
        for key, part in schema.items()
    }


def _locate_error(settings: Any, validate: Any, info: ValidationInfo) -> Any:
    """Turn a check's `MaxlmError` into pydantic's, which knows the key, for
    `load_config`."""
    try:
        return validate(settings)
    except MaxlmError as error:
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
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        schema = handler(source)
        model: Any = handler.resolve_ref_schema(schema)
        inner = _check_scalars(model)
        ref = model.get("ref")
        inner.pop("ref", None)
        model.clear()
        wrapper = core_schema.with_info_wrap_validator_function
        model.update(wrapper(_locate_error, inner, **({"ref": ref} if ref else {})))
        return schema

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        found = handler(core)
        properties = handler.resolve_ref_schema(found).get("properties", {})
        for model in cls.__mro__[: cls.__mro__.index(BaseModel)]:
            for name, text in _parse_field_docstrings(model).items():
                properties.get(name, {}).setdefault("description", text)
        return found


@cache
def _parse_field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings under a model's own fields. Pydantic's
    ``use_attribute_docstrings`` would read every source file when a verb starts."""
    body: Any = ast.parse(dedent(inspect.getsource(model))).body[0]
    found = {}
    for pair in pairwise(body.body):
        match pair:
            case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = inspect.cleandoc(text)
    return found


def add_default_tag(name: str, value: str) -> BeforeValidator:
    """Adds the key ``name`` where a mapping lacks it, for a union discriminated by
    it."""

    def add(settings: Any) -> Any:
        if isinstance(settings, Mapping) and name not in settings:
            return {name: value, **settings}
        return settings

    return BeforeValidator(add)


def _check_file_name(text: str) -> str:
    for part in text.split("/"):
        if not part or part[0] in ".- " or not part.isprintable() or "\\" in part:
            raise ValueError(
                f"{text[:60]!r} names no folder; write a plain name such as my_run-2: "
                f"nothing "
                "before a slash or behind it may be empty or begin with a dot, a dash "
                "or a space"
            )
    if (
        len(text.encode()) > 200
    ):  # of the 255 that file systems take; temporary names are longer
        raise ValueError(
            f"{text[:60]!r}... is too long for a folder; use 200 bytes at most"
        )
    return text


FileName = Annotated[str, AfterValidator(_check_file_name)]
"""A relative path without ``..`` or hidden parts: joined to a folder, it stays inside
it."""


def check_local_path(path: _Path) -> _Path:
    """Return a path as it is; refuse a URL, for which a folder such as `s3:` would be
    made."""
    # A Path has made one slash of two.
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", str(path)):
        what = (
            f"{found[1]}://{found[2]} is not on a disk; only a token store to read and "
        )
        fix = f"use a folder here, and copy it with {_TOOLS.get(found[1], 'a tool of its own')}"
        raise MaxlmError(f"{what}checkpoint.remote_folder may be URLs", fix=fix)
    return path


def check_path_is_text(path: _Path) -> _Path:
    """Return a path as it is; refuse one that holds a NUL or a lone surrogate.

    Python keeps a byte of the command line that is no UTF-8 as the latter. Files under
    such names can be read, but libraries write none, and no config can say the name
    again.
    """
    if _NO_TEXT.search(str(path)):
        what = f"the path {str(path)[:60]!r} is no text in UTF-8"
        raise MaxlmError(what, fix="name another")
    return path


LocalPath = Annotated[
    str,
    AfterValidator(check_path_is_text),
    AfterValidator(check_local_path),
    WrapValidator(_locate_error),
]
"""A path in a config, which must lie on a disk."""
