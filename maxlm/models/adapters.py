"""Adapters: other ways in which a model's parameters rest, such as beside small trained ones.

An adapter is a config with a ``kind`` and one method, from declarations to declarations. To add
one, write an :class:`Adapter` and register it (:func:`register_adapter`, or in an installed package
an entry point of the group ``maxlm.adapters`` named as its kind).
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from maxlm.config import Config, MaxlmError
from maxlm.models.architectures import Model, ModelConfig
from maxlm.models.params import Params, declare_at_rest, param_specs


class Adapter(Config):
    """A way to adapt a model, with a ``kind`` of its own and that kind's settings."""

    kind: Any

    def adapt(self, specs: Params) -> Params:
        """Return the declarations of a model with a :class:`~maxlm.models.params.Leaf` of
        declarations in place of each parameter that is adapted."""
        raise NotImplementedError


_ADAPTERS: dict[str, type[Adapter]] = {}


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Make an adapter known by its kind; also as a decorator."""
    _ADAPTERS[adapter.model_fields["kind"].default] = adapter
    return adapter


def parse_adapter(given: Any) -> Any:
    """Reads the config of a registered or installed adapter from plain data with its ``kind``."""
    if not isinstance(given, Mapping):
        return given
    kind = str(given.get("kind"))
    if kind not in _ADAPTERS:
        for entry in entry_points(group="maxlm.adapters", name=kind):
            register_adapter(entry.load())
    if kind not in _ADAPTERS:
        raise MaxlmError(
            f"no adapter of kind={kind}",
            fix=f"use one of {', '.join(_ADAPTERS)}"
            if _ADAPTERS
            else "install the package that has it",
        )
    return _ADAPTERS[kind].model_validate(given)


AdapterConfig = Annotated[SerializeAsAny[Adapter], BeforeValidator(parse_adapter)]


def build_adapted_model(config: ModelConfig, adapter: Adapter | None, **how: Any) -> Model:
    """Builds a model, ``how`` as of ``config.build``, whose parameters rest as its adapter says."""
    model = config.build(**how)
    return model if adapter is None else declare_at_rest(model, adapter.adapt(param_specs(model)))
