"""A token store in memory, whose tokens say where they lie."""

import hashlib
import sys

import cloudpickle
import numpy as np
import pytest


class MemoryStore:
    """Documents of given lengths; token i of the store is i, so a batch shows what it read."""

    def __init__(self, lengths, path=None):
        self.offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
        self.offsets = self.offsets.astype(np.int64)
        self.path, self.offsets_sha256 = path, hashlib.sha256(self.offsets).hexdigest()

    @property
    def num_tokens(self):
        return int(self.offsets[-1])

    def read_many(self, starts, stops):
        assert all(0 <= a < b <= self.num_tokens for a, b in zip(starts, stops, strict=True))
        return [np.arange(a, b, dtype=np.uint32) for a, b in zip(starts, stops, strict=True)]


@pytest.fixture(scope="session")
def memory_store():
    """The class, picklable into worker processes that cannot import this file."""
    cloudpickle.register_pickle_by_value(sys.modules[MemoryStore.__module__])
    return MemoryStore
