"""Pages of keys and values in the compute dtype."""

from typing import Any, NamedTuple

import jax

from maxlm.models.caches.ragged import RaggedBatch
from maxlm.parallel.paged_attention import write_and_attend
from maxlm.sharding import AxisRules


class PagedCache(NamedTuple):
    """Keys and values in pages [D, P, K, page, H], which sequences hold by tables, and share where
    they begin alike."""

    key: Any
    value: Any
    """None: a token's value is the beginning of its key."""

    def attend(
        self,
        q: jax.Array,
        key: jax.Array,
        value: jax.Array | None,
        batch: RaggedBatch,
        *,
        window: int | None,
        rules: AxisRules,
        **options: Any,
    ) -> tuple[jax.Array, "PagedCache"]:
        """Attends to each sequence's earlier tokens and these; returns also the cache with these.

        Args:
            q: [D, S, N, H].
            key, value: [D, S, K, H] and [D, S, K, Hv].
            options: ``scale``, ``soft_cap``, ``slopes``, ``biases`` and ``value_dim`` of
                ``pallas_kernels.paged_attention``.
        """
        where, shape = batch.pages(window), {"uniform_rows": batch.uniform_rows}
        own: Any = {"window": window, "rules": rules, **shape, **options}
        y, *pages = write_and_attend(q, key, value, self.key, self.value, where, **own)
        return y, PagedCache(*pages)
