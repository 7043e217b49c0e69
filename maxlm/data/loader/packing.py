"""Sequences of seq_len tokens out of a store's documents, as lists of pieces.

A piece is a run of tokens of one document. Either method puts every token of the store into
exactly one sequence:

  concat    the documents one after another, cut every seq_len tokens. Nothing is stored and
            nothing is padded but the very end; most documents lose context at a cut.
  best_fit  documents kept whole where they fit (Ding et al. 2024, "Fewer Truncations Improve
            Language Modeling"): see best_fit.py. A little padding, an index beside the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


Offsets = Any
"""int64 [num_documents + 1], from 0 to num_tokens: an array, or what can be indexed by slices and
arrays and has `size` and `searchsorted` as one does."""


class TokenSource(Protocol):
    """The part of a token store that the loader reads; `maxlm.data.store.TokenStore` has it."""

    @property
    def path(self) -> Path | None:
        """The store's folder, where an index may be kept; None keeps it in memory."""
        ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def offsets(self) -> Offsets:
        """Where documents start."""
        ...

    @property
    def offsets_sha256(self) -> Any:  # A str; Any also admits a cached_property.
        """A hash of the offsets, which names an index; not used where `path` is None."""
        ...

    def read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[NDArray[np.integer]]:
        """The tokens of every range [start, stop), read concurrently."""
        ...


class DocumentSpans(NamedTuple):
    """The pieces of some sequences, in order, one after another."""

    counts: Int64s
    """DocumentSpans in each sequence [n]."""
    starts: Int64s
    """Each piece's first token in the store [sum(counts)]."""
    lengths: Int64s
    """Each piece's tokens, at least 1 [sum(counts)]."""
    ends: NDArray[np.bool_]
    """Whether the piece reaches the end of its document [sum(counts)]."""


class Packing(Protocol):
    """A store's sequences, looked up by number."""

    @property
    def num_sequences(self) -> int: ...

    def pieces(self, sequences: Int64s) -> DocumentSpans:
        """The pieces of the given sequences [n], each in range(num_sequences)."""
        ...


@dataclass(frozen=True)
class ConcatPacking:
    """Concatenate and cut: sequence i is tokens [i * seq_len, (i + 1) * seq_len) of the store."""

    store: TokenSource
    seq_len: int

    @property
    def num_sequences(self) -> int:
        return -(-self.store.num_tokens // self.seq_len)

    def pieces(self, sequences: Int64s) -> DocumentSpans:
        offsets = self.store.offsets
        begins = sequences * self.seq_len
        ends = np.minimum(begins + self.seq_len, self.store.num_tokens)
        # offsets[first:last] are the document starts strictly inside each sequence. As many are
        # below an end as are at most one less: one search for both.
        found = offsets.searchsorted(np.concatenate([begins, ends - 1]), side="right")
        first, last = np.split(found, 2)
        counts = last - first + 1
        row = np.repeat(np.arange(sequences.size), counts)
        nth = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.where(nth == 0, begins[row], offsets[np.maximum(first[row] + nth - 1, 0)])
        is_last = nth == counts[row] - 1
        stops = np.where(is_last, ends[row], np.append(starts[1:], 0))
        document_ends = ~is_last | (offsets[last] == ends)[row]
        kept = stops > starts  # An empty document starts where the next one does.
        return DocumentSpans(
            np.bincount(row[kept], minlength=sequences.size),
            starts[kept],
            (stops - starts)[kept],
            document_ends[kept],
        )


def measure_utilisation(packing: Packing, num_tokens: int, seq_len: int) -> float:
    """The share of the sequences' places that hold a token; the rest is padding."""
    return num_tokens / (packing.num_sequences * seq_len)
