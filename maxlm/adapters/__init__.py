"""Adapters: small trained parameters beside a model's own, by kind.

To add one, write an :class:`~maxlm.models.adapters.Adapter` in a file here and add it
to ``_Builtin``, or register it from outside (:mod:`maxlm.models.adapters`).
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, WrapValidator

from maxlm.adapters.bottleneck import BottleneckAdapter
from maxlm.adapters.ia3 import Ia3Adapter
from maxlm.adapters.lora import LoraAdapter
from maxlm.adapters.virtual_tokens import PrefixAdapter, PromptAdapter
from maxlm.models.adapters import Adapter, parse_adapter

_Builtin = LoraAdapter | Ia3Adapter | BottleneckAdapter | PrefixAdapter | PromptAdapter
_KINDS = [adapter.model_fields["kind"].default for adapter in _Builtin.__args__]


def _validate_adapter(settings: Any, validate: Any) -> Adapter:
    if isinstance(settings, Adapter):
        return settings
    if isinstance(settings, Mapping) and settings.get("kind") not in _KINDS:
        return parse_adapter(settings)
    return validate(settings)


AdapterConfig = Annotated[
    SerializeAsAny[_Builtin],
    Field(discriminator="kind"),
    WrapValidator(_validate_adapter),
]
