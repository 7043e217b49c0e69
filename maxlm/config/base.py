"""The base of every component's config."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Config(BaseModel):
    """A frozen, strictly checked description of one component.

    Unknown keys are errors. A docstring under a field is its documentation: it reaches
    ``maxlm config schema`` and so the user's editor.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def default_tag(name: str, value: str) -> BeforeValidator:
    """For a union that pydantic tells apart by a key ``name``: what a mapping without it is."""

    def add(settings: Any) -> Any:
        if isinstance(settings, Mapping) and name not in settings:
            return {name: value, **settings}
        return settings

    return BeforeValidator(add)
