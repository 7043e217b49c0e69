"""Caches: what a mixer keeps of earlier tokens, so that a new one costs as little as it
can.

A step of inference runs tokens of several sequences side by side, [D, S], D counting
the shards of the batch: first those of ``uniform_rows``, sequences that continue by the
same number of tokens each, then chunks of prompts (:class:`RaggedBatch`). A cache is a
pytree of arrays that one mixer reads and writes; layers only hand it on. Attention's
take tokens by ``attend``, which also answers their queries: :class:`PagedCache` keeps
all as it is, ``QuantizedCache`` in fewer bits, ``EvictingCache`` a fixed number of
tokens. A mixer with a state instead of keys keeps a :class:`RecurrentCache`.
"""

from maxlm.models.caches.layout import CacheArraySpec, CacheLayout, LayerCache
from maxlm.models.caches.ragged import RaggedBatch, RecurrentCache, SplitArray

__all__ = [
    "CacheArraySpec",
    "CacheLayout",
    "LayerCache",
    "RaggedBatch",
    "RecurrentCache",
    "SplitArray",
]
