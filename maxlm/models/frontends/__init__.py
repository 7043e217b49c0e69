"""What turns inputs other than tokens into vectors, by kind; see
:mod:`maxlm.models.frontends.frontend`.

To add one, write a :class:`FrontendConfig` and its module in a file here and name them
in ``FRONTENDS``, or register them from outside: an installed package names a
:class:`RegisteredFrontend` in an entry point of the group ``maxlm.frontends``.
"""

from operator import attrgetter
from typing import Annotated

from maxlm.config.registry import RegisteredConfig, Registry
from maxlm.models.frontends.frontend import (
    ARRAY_PREFIX,
    VECTOR_NUMBERS,
    Frontend,
    FrontendConfig,
    FrontendCosts,
    InputVectors,
    ItemArrays,
    ItemArraySpec,
    RegisteredFrontend,
    get_frontend_costs,
)

FRONTENDS = Registry[RegisteredFrontend](
    "frontend", {"embeddings": "maxlm.models.frontends.embeddings:EMBEDDINGS"}
)

FrontendChoice = Annotated[
    FrontendConfig,
    RegisteredConfig(FRONTENDS, FrontendConfig, get_config=attrgetter("config")),
]

__all__ = [
    "ARRAY_PREFIX",
    "FRONTENDS",
    "VECTOR_NUMBERS",
    "Frontend",
    "FrontendChoice",
    "FrontendConfig",
    "FrontendCosts",
    "InputVectors",
    "ItemArraySpec",
    "ItemArrays",
    "RegisteredFrontend",
    "get_frontend_costs",
]
