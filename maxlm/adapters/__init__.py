"""Adapters: small trained parameters beside a model's own, by kind.

To add one, write an :class:`~maxlm.models.adapters.Adapter` in a file here and name it
in ``ADAPTERS``, or register it from outside: ``ADAPTERS.register("kind")`` decorates
its class, and an installed package names its class in an entry point of the group
``maxlm.adapters``.
"""

from typing import Annotated

from maxlm.config.registry import RegisteredConfig, Registry
from maxlm.models.adapters import Adapter

ADAPTERS = Registry[type[Adapter]](
    "adapter",
    {
        "lora": "maxlm.adapters.lora:LoraAdapter",
        "ia3": "maxlm.adapters.ia3:Ia3Adapter",
        "bottleneck": "maxlm.adapters.bottleneck:BottleneckAdapter",
        "prefix": "maxlm.adapters.virtual_tokens:PrefixAdapter",
        "prompt": "maxlm.adapters.virtual_tokens:PromptAdapter",
    },
)
AdapterConfig = Annotated[Adapter, RegisteredConfig(ADAPTERS, Adapter)]

__all__ = ["ADAPTERS", "Adapter", "AdapterConfig"]
