"""Orders of a matrix's rows: llama.cpp's beside those of Hugging Face's files.

Rows are whole blocks of any number format, so that codes are reordered as they are.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class RowOrder(Protocol):
    """An order of rows."""

    @property
    def num_groups(self) -> int:
        """Equal parts of all rows, which are alike."""
        ...

    def list_rows(self, num_rows: int) -> np.ndarray:
        """Returns for each row of a GGUF file the number of that row in Hugging Face's:
        int [num_rows]."""
        ...


@dataclass(frozen=True)
class PairedRotary:
    """Rows of queries or keys, where llama.cpp turns neighbouring dimensions of a head
    (its "NORM" kind of RoPE) and Hugging Face i with i + H/2: within each head 0, H/2,
    1, H/2 + 1 and so on (``permute`` of llama.cpp's conversion)."""

    num_heads: int

    @property
    def num_groups(self) -> int:
        return 2 * self.num_heads

    def list_rows(self, num_rows: int) -> np.ndarray:
        by_half = np.arange(num_rows).reshape(self.num_heads, 2, -1)
        return by_half.swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class QueriesFirst:
    """Rows of queries, keys and values in one matrix: Hugging Face has, for each kv
    head, those of its queries' heads, its key and its value (GPT-NeoX, Falcon);
    llama.cpp all queries, all keys, all values."""

    num_kv_heads: int
    queries_per_kv_head: int

    @property
    def num_groups(self) -> int:
        return self.num_kv_heads * (self.queries_per_kv_head + 2)

    def list_rows(self, num_rows: int) -> np.ndarray:
        heads_per_group = self.queries_per_kv_head + 2
        groups = np.arange(num_rows).reshape(self.num_kv_heads, heads_per_group, -1)
        queries = groups[:, :-2].reshape(-1)
        keys = groups[:, -2].reshape(-1)
        values = groups[:, -1].reshape(-1)
        return np.concatenate([queries, keys, values])
