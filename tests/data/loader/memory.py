"""A token store in memory, whose tokens say where they lie; worker processes import it
too."""

import hashlib
import os
from multiprocessing import parent_process

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.loader.batches import LoaderConfig


class MemoryStore:
    """Documents of given lengths; token i of the store is i, so a batch shows what it
    read."""

    def __init__(self, lengths, path=None):
        self.offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
        self.offsets = self.offsets.astype(np.int64)
        self.path = path
        self.offsets_sha256 = hashlib.sha256(self.offsets).hexdigest()

    @property
    def num_tokens(self):
        return int(self.offsets[-1])

    def read_many(self, starts, stops):
        assert all(
            0 <= a < b <= self.num_tokens for a, b in zip(starts, stops, strict=True)
        )
        return [
            np.arange(a, b, dtype=np.uint32) for a, b in zip(starts, stops, strict=True)
        ]


def config(**changes):
    return LoaderConfig(
        **{"seq_len": 16, "batch_size": 8, "packing_block": 7, **changes}
    )


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert np.array_equal(a[name], b[name]), name


def name_maker(step):
    """A batch that says which process made it."""
    return {"step": np.array(step), "pid": np.array(os.getpid())}


def fail_in_a_worker(step):
    if parent_process() is not None:
        raise MaxlmError(f"step {step} is damaged")
    return name_maker(step)


def take_until_workers_make(loader):
    batches = []
    while not batches or batches[-1]["pid"] == os.getpid():
        batches.append(next(loader))
    return batches
