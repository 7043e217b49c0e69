"""Settings of the engine."""

from pydantic import Field, model_validator

from maxlm.config import Config
from maxlm.inference.pages import count_spanned_pages
from maxlm.inference.speculation import SpeculationConfig
from maxlm.models.caches.config import (
    AnyCacheConfig,
    PagedCacheConfig,
    find_default_page_size,
)
from maxlm.runtime.json_types import JsonObject

MIN_CHUNK = 16
"""Tokens of the smallest size that prompts are computed in, at most."""


class EngineConfig(Config):
    """How much the engine holds at once, and does in one step; numbers are for each
    data shard."""

    max_sequences: int = Field(default=16, gt=0)
    """Sequences that run together; others wait."""
    max_length: int = Field(default=2048, gt=1)
    """Tokens of the longest sequence, prompt and output."""
    page_size: int = Field(default=16, gt=0)
    """Tokens a page of the cache: small ones waste less at a sequence's end and share
    more, large ones are read faster."""
    num_pages: int | None = Field(default=None, gt=1)
    """Pages of the cache in each layer that sees everything, one of them for padding;
    layers with a window need fewer. null: enough for ``max_sequences`` of
    ``max_length``."""
    prefill_tokens: int = Field(default=512, gt=0)
    """Tokens of prompts in one step: more start sooner, and hold up those that
    decode."""
    max_chunks: int = Field(default=8, gt=0)
    """Prompts that have a part in them."""
    decode_steps: int = Field(default=8, gt=0)
    """Tokens that each sequence generates in one dispatch while no prompt is computed
    and nothing needs the host between: more cost less each, and arrive in larger
    groups."""
    prefix_cache: bool = True
    """true: computed pages stay while there is room, and prompts that begin alike share
    them; false: each request computes its own."""
    dispatch_seconds: float = Field(default=0.05, gt=0)
    """Time that a dispatch of several steps may take, about: a request that comes
    meanwhile waits for its end."""
    speculation: SpeculationConfig | None = None
    """Guess several tokens a step; null: none."""
    cache: AnyCacheConfig = PagedCacheConfig()
    """How keys and values are kept: all of them, in fewer bits, or a part. All but
    ``paged`` are lossy, share no prefixes, and depend a little on the chunks that a
    prompt is computed in."""
    max_adapters: int = Field(default=0, ge=0)
    """LoRA adapters that are loaded at once; 0: none, and nothing is computed for
    them."""
    max_adapter_rank: int = Field(default=16, gt=0)
    """Their largest rank; each takes memory and time as if it had this one."""
    shares_params: bool = False
    """true: steps read the parameters that the engine is given, such as a trainer's on
    the same mesh, where and as they are stored, and gather and cast those of a layer
    when its turn comes: they are held once, and each step takes longer. false: the
    engine makes a copy that steps read fastest: in the compute dtype, whole but for
    tensor parallelism, layers out of their stacks."""
    batch_invariant: bool = False
    """true: a token's log-probability has the same bits whatever runs beside it, in any
    chunks and pages, as in a training forward pass with `parallel.batch_invariant`;
    slow, and for decoders of attention and dense feed-forwards alone. false: as fast as
    can be, where log-probabilities differ by rounding."""
    accepts_embeddings: bool = False
    """Whether requests may have vectors in place of tokens' embeddings where the model
    has no frontend; where it has one they always may."""
    record_routes: bool = False
    """Whether requests may ask for the experts that each token met: steps return them
    for every token, and pages of kept prefixes hold theirs. false: nothing is computed
    for them."""

    @model_validator(mode="before")
    @classmethod
    def _set_page_size(cls, settings: JsonObject) -> JsonObject:
        """A page is a group with a scale of its own in int8 and int4: larger ones cost
        less."""
        cache = settings.get("cache")
        kind = (
            cache.get("kind")
            if isinstance(cache, dict)
            else getattr(cache, "kind", None)
        )
        page_size = find_default_page_size(kind) if isinstance(kind, str) else None
        return settings if page_size is None else {"page_size": page_size, **settings}

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.max_length // self.page_size)

    @property
    def chunk_sizes(self) -> list[int]:
        """Numbers of prompts' tokens that steps are compiled for, the smallest
        first."""
        sizes = [self.prefill_tokens]
        while sizes[0] >= 4 * MIN_CHUNK:
            sizes.insert(0, -(-sizes[0] // 4))
        return sizes

    def limit_chunk_tokens(self, num_tokens: int) -> int:
        """Returns how many of so many tokens a step computes: all, but where half or
        more of the size that holds them would be padding, as many as the next smaller
        one holds."""
        smaller = 0
        for size in self.chunk_sizes:
            if size >= num_tokens:
                is_half_padding = 2 * num_tokens <= size
                return smaller if smaller and is_half_padding else num_tokens
            smaller = size
        raise ValueError(f"{num_tokens} tokens in chunks of {self.prefill_tokens}")

    def count_pages(self, windows: tuple[int | None, ...]) -> tuple[int, ...]:
        """Return the pages of each group's pool in one shard, page 0 included.
        ``windows``: tokens that a token sees in each group of layers, itself included;
        None: all."""
        # Page 0 is padding.
        full = self.num_pages or self.max_sequences * self.pages_per_sequence + 1
        counts = []
        for window in windows:
            if window is None:
                counts.append(full)
                continue
            # The first token of a chunk sees a window before it, its last one the
            # chunk.
            num_seen = window - 1 + self.prefill_tokens
            num_spanned = count_spanned_pages(num_seen, self.page_size)
            counts.append(min(full, self.max_sequences * num_spanned + 1))
        return tuple(counts)
