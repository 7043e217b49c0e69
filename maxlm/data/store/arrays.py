"""The zarr3 arrays of a token store: layout, creation, opening.

Tokens lie in shards of 16 Mi (one file each, so a trillion tokens is 60,000 files) cut
into chunks of 16 Ki that are compressed apart, so that a short random range costs one
small read. LZ4, not zstd: 40% larger on disk, but it doubles the rate of short random
reads. Chunks and the shards' indices carry a CRC-32C, so a damaged one is an error.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.runtime.storage import (
    Place,
    get_read_failure_fix,
    join_place,
    make_kvstore_spec,
)

Int64s = NDArray[np.int64]

SHARD_TOKENS = 16 << 20
CHUNK_TOKENS = 16 << 10
CHUNK_OFFSETS = 4 << 10
_CODECS = {"tokens": "lz4", "offsets": "zstd"}


def create_array(folder: Path, name: str, size: int, dtype: str):
    """Create the 1-D array `folder/name` and return its TensorStore, open for
    writing."""
    compressor = {"cname": _CODECS[name], "clevel": 5, "shuffle": "shuffle"}
    to_bytes = {"name": "bytes", "configuration": {"endian": "little"}}
    checksum = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [
            CHUNK_TOKENS if name == "tokens" else min(CHUNK_OFFSETS, CHUNK_TOKENS)
        ],
        "codecs": [to_bytes, {"name": "blosc", "configuration": compressor}, checksum],
        "index_codecs": [to_bytes, checksum],
    }
    metadata = {
        "shape": [size],
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [SHARD_TOKENS]},
        },
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return _open(
        folder / name, {"metadata": metadata, "create": True, "delete_existing": True}
    )


def open_for_writing(folder: Path, name: str):
    """Opens the TensorStore of an array that `create_array` made."""
    return _open(folder / name, {})


def write_array(array, start: int, values: np.ndarray, folder: Path) -> None:
    """Write `values` from index `start` of a TensorStore, and wait until they are on
    disk."""
    try:
        array[start : start + len(values)].write(values).result()
    except (ValueError, OSError) as error:
        fix = "free some disk space, or check the folder and its permissions"
        raise make_array_error(folder, error, fix) from error


def open_for_reading(folders: Sequence[Place], name: str, cache_bytes: int):
    """Opens the TensorStore of an array in pieces in `folders`, with a cache of
    `cache_bytes` decompressed bytes. Of offsets the first piece's first and every
    piece's others count."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    # A finished store never changes, so what is cached need not be checked against the
    # disk.
    options = {"recheck_cached_data": False, "recheck_cached_metadata": False}
    pieces = [
        _open(join_place(f, name), options, read=True, context=context) for f in folders
    ]
    skipped = 1 if name == "offsets" else 0
    pieces = [pieces[0], *(piece[skipped:] for piece in pieces[1:])]
    return pieces[0] if len(pieces) == 1 else ts.concat(pieces, axis=0)


def _open(path: Place, options: dict[str, Any], **kwargs: Any):
    import tensorstore as ts

    spec = {
        "driver": "zarr3",
        "kvstore": make_kvstore_spec(path),
        # By default a missing chunk reads as zeros, so a lost file would pass for
        # tokens.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    try:
        return ts.open(spec | options, **kwargs).result()
    except (ValueError, OSError) as error:
        fix = get_read_failure_fix(
            path, "check the disk, or build the store again with maxlm corpus build"
        )
        raise make_array_error(path, error, fix) from error


def make_array_error(
    path: Place, error: Exception, fix: str, what: str = "array error"
) -> MaxlmError:
    """Describes a TensorStore error in one line, without its source locations."""
    reason = str(error).split(" [")[0].splitlines()[0]
    return MaxlmError(f"{what}: {reason}", where=str(path), fix=fix)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the narrowest of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Offsets:
    """Rising int64 numbers [size], read as they are needed; a stand-in for an array of
    them.

    10^9 documents have 8 GB of offsets. This answers what the loader asks of them: it
    is indexed by a slice or an array of indices and knows `size` and `searchsorted`.
    Threads may use it together.

    Args:
        read: the offsets at a slice within [0, size) or at an array of indices.
    """

    def __init__(self, read: Callable[[slice | Int64s], Int64s], size: int):
        self.size, self._read = size, read

    def __getitem__(self, key: slice | Int64s) -> Int64s:
        return self._read(
            slice(*key.indices(self.size)) if isinstance(key, slice) else key
        )

    def searchsorted(self, values: Int64s, side: Literal["right"]) -> Int64s:
        """Bisects as numpy's does: some log2(size / 2^12) chunks a value [n], most of
        them kept."""
        low = np.zeros_like(values)
        high = np.full_like(values, self.size)
        while (left := np.flatnonzero(low < high)).size:
            middle = (low[left] + high[left]) // 2
            is_low = self[middle] <= values[left]
            low[left[is_low]] = middle[is_low] + 1
            high[left[~is_low]] = middle[~is_low]
        return low
