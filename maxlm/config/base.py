"""The base of every component's config."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from maxlm.config import fields


def _check_scalars(schema: Any) -> Any:
    """Return a core schema that takes no boolean for a number, no number for a boolean and no
    integer of more than 64 bits, at any depth."""
    if isinstance(schema, list | tuple):
        return type(schema)(_check_scalars(item) for item in schema)
    if not isinstance(schema, dict):
        return schema
    kind: Any = schema.get("type")
    if isinstance(kind, str) and kind in ("int", "float", "bool"):

        def check(value: Any, validate: Callable[[Any], Any]) -> Any:
            if isinstance(value, int | float) and isinstance(value, bool) != (kind == "bool"):
                raise PydanticCustomError(f"{kind}_type", f"Input should be a valid {kind}")
            found = validate(value)
            if kind == "int" and not -(2**63) <= found < 2**63:
                raise PydanticCustomError("int_size", "Input should be an integer of 64 bits")
            return found

        scalar: Any = schema
        return core_schema.no_info_wrap_validator_function(check, scalar)
    data = ("default", "expected", "metadata", "serialization") if isinstance(kind, str) else ()
    return {key: part if key in data else _check_scalars(part) for key, part in schema.items()}


class Config(BaseModel):
    """A frozen, strictly checked description of one component.

    Unknown keys are errors. Booleans are no numbers and numbers no booleans, and integers have 64
    bits. A docstring under a field is its documentation: it reaches ``maxlm config schema`` and so
    the user's editor.
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
        model.update(_check_scalars(model))
        return schema

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        found = handler(core)
        properties = handler.resolve_ref_schema(found).get("properties", {})
        for name, text in fields.parse_field_docstrings(cls).items():
            if name in properties:
                properties[name].setdefault("description", text)
        return found


def add_default_tag(name: str, value: str) -> BeforeValidator:
    """Adds the key ``name`` where a mapping lacks it, for a union discriminated by it."""

    def add(settings: Any) -> Any:
        if isinstance(settings, Mapping) and name not in settings:
            return {name: value, **settings}
        return settings

    return BeforeValidator(add)


def _check_file_name(text: str) -> str:
    for part in text.split("/"):
        if not part or part[0] in ".- " or not part.isprintable() or "\\" in part:
            raise ValueError(
                f"{text[:60]!r} names no folder; write a plain name such as my_run-2: nothing "
                "before a slash or behind it may be empty or begin with a dot, a dash or a space"
            )
    if len(text.encode()) > 200:  # of the 255 that file systems take; temporary names are longer
        raise ValueError(f"{text[:60]!r}... is too long for a folder; use 200 bytes at most")
    return text


FileName = Annotated[str, AfterValidator(_check_file_name)]
"""A relative path without ``..`` or hidden parts: joined to a folder, it stays inside it."""
