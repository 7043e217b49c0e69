"""The base of every component's config."""

from pydantic import BaseModel, ConfigDict


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
