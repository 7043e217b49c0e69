"""Which sequence of which store stands at each global index."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from maxlm.data.loader.mixture import Mixture
from maxlm.data.loader.permutation import derive_keys, permute

Int64s = NDArray[np.int64]
PADDING = -1


class Order(Protocol):
    """Where each global index [n] lies: store numbers [n] and sequences [n] of those stores."""

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]: ...


@dataclass(frozen=True)
class EndlessOrder:
    """Stores mixed by weight, each read epoch after epoch, each epoch in an order of its own."""

    mixture: Mixture
    num_sequences: tuple[int, ...]
    shuffle_keys: tuple[int, ...] | None
    """A key for each store; None reads every epoch in store order."""

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        stores, streams = self.mixture.locate(indices)
        sequences = np.empty_like(streams)
        for store in np.unique(stores):
            here = stores == store
            size = self.num_sequences[store]
            epochs, within = np.divmod(streams[here], size)
            if self.shuffle_keys is not None:
                within = permute(within, size, derive_keys(self.shuffle_keys[store], epochs))
            sequences[here] = within
        return stores, sequences


@dataclass(frozen=True)
class OnePassOrder:
    """One store, once, in store order; past its end every index is `PADDING`."""

    num_sequences: int

    def locate(self, indices: Int64s) -> tuple[Int64s, Int64s]:
        return np.where(indices < self.num_sequences, 0, PADDING), indices
