"""Settings of the caches that a decoder serves from."""

from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.config.registry import RegisteredConfig, Registry


class CacheConfig(Config):
    """How attention keeps keys and values, with a ``kind`` of its own."""

    kind: Any


class PagedCacheConfig(CacheConfig):
    """All keys and values, in the compute dtype."""

    kind: Literal["paged"] = "paged"


class QuantizedCacheConfig(CacheConfig):
    """All keys and values, in fewer bits (KIVI, arXiv 2402.02750): keys with a scale
    per channel of a page, values with one per token and head. Prompts attend to their
    own chunk as it is."""

    kind: Literal["int8", "int4"]
    """int8: symmetric; int4: with a zero point, half the bytes and a little quality."""
    recent: int = Field(default=64, gt=0)
    """Last tokens that are kept as they are, up to a page more; rounded up to whole
    pages."""


class _BudgetConfig(CacheConfig):
    budget: int = Field(gt=0)
    """Tokens of a sequence, layer and kv head that are kept."""

    @model_validator(mode="after")
    def _within_budget(self):
        name = "num_sinks" if self.kind == "sinks" else "recent"
        tokens = getattr(self, name)
        if tokens >= self.budget:
            message = f"{name}={tokens} leaves nothing of budget={self.budget}"
            raise MaxlmError(message, fix=f"raise budget, or lower {name}")
        return self


class SinksCacheConfig(_BudgetConfig):
    """The first and the last tokens (StreamingLLM, arXiv 2309.17453), at their own
    positions."""

    kind: Literal["sinks"]
    num_sinks: int = Field(default=4, ge=0)
    """The first ones among them; 0: the last ones alone."""


class HeavyHittersCacheConfig(_BudgetConfig):
    """Tokens that have been attended to most, and the last ones (H2O, arXiv
    2306.14048); each kv head keeps its own, by the weights that its query heads gave,
    summed over all queries."""

    kind: Literal["h2o"]
    recent: int = Field(gt=0)
    """The last ones among them; half of the budget in the paper."""


class SnapKVCacheConfig(_BudgetConfig):
    """The tokens of a prompt that its last ones attend to, and their neighbours
    (SnapKV, arXiv 2404.14469). Generated tokens take the place of the weakest, and of
    each other behind the last ``recent``. A prompt in several chunks is cut to the
    budget after each."""

    kind: Literal["snapkv"]
    recent: int = Field(default=32, gt=0)
    """The last ones among them, and the tokens of a prompt that choose."""
    pooling: int = Field(default=7, gt=0)
    """Kept tokens side by side over which weights are averaged, an odd number."""

    @model_validator(mode="after")
    def _pools_around(self):
        if self.pooling % 2 == 0:
            raise MaxlmError(f"pooling={self.pooling} is even", fix="use an odd number")
        return self


EvictingCacheConfig = SinksCacheConfig | HeavyHittersCacheConfig | SnapKVCacheConfig
_KINDS = "maxlm.models.caches.kinds"
CACHES = Registry[Any](
    "cache",
    {
        "paged": f"{_KINDS}:PAGED",
        "int8": f"{_KINDS}:INT8",
        "int4": f"{_KINDS}:INT4",
        "sinks": f"{_KINDS}:SINKS",
        "h2o": f"{_KINDS}:HEAVY_HITTERS",
        "snapkv": f"{_KINDS}:SNAPKV",
    },
)
"""A :class:`~maxlm.models.caches.kinds.RegisteredCache` by kind."""
AnyCacheConfig = Annotated[
    CacheConfig,
    RegisteredConfig(
        CACHES, CacheConfig, default="paged", get_config=attrgetter("config")
    ),
]


def find_default_page_size(kind: str) -> int | None:
    """Returns the tokens of a page where none are set; None: the engine's default."""
    registered = CACHES.find(kind)
    return None if registered is None else registered.page_size
