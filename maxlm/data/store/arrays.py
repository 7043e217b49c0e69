"""The zarr3 arrays of a token store: layout, creation, opening.

Tokens lie in shards of 16 Mi (one file each, so a trillion tokens is 60,000 files) cut
into chunks of 16 Ki that are compressed apart, so that a short random range costs one
small read. LZ4, not zstd: 40% larger on disk, but it doubles the rate of short random
reads. Chunks and the shards' indices carry a CRC-32C, so a damaged one is an error.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.runtime.storage import (
    Place,
    get_read_failure_fix,
    join_place,
    make_kvstore_spec,
)

if TYPE_CHECKING:
    import tensorstore as ts

Int64s = NDArray[np.int64]

SHARD_TOKENS = 16 << 20
CHUNK_TOKENS = 16 << 10
CHUNK_OFFSETS = 4 << 10
ArrayName = Literal["tokens", "offsets"]
_CODECS: dict[ArrayName, str] = {"tokens": "lz4", "offsets": "zstd"}


def create_array(
    folder: Path, name: ArrayName, size: int, dtype: str
) -> "ts.TensorStore":
    """Create the 1-D array `folder/name` and return its TensorStore, open for
    writing."""
    chunk_size = CHUNK_TOKENS
    if name == "offsets":
        # Tests make shards, which hold whole chunks, smaller than CHUNK_OFFSETS.
        chunk_size = min(CHUNK_OFFSETS, CHUNK_TOKENS)
    to_bytes = {"name": "bytes", "configuration": {"endian": "little"}}
    compression = {"cname": _CODECS[name], "clevel": 5, "shuffle": "shuffle"}
    compress = {"name": "blosc", "configuration": compression}
    checksum = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [chunk_size],
        "codecs": [to_bytes, compress, checksum],
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
    options = {"metadata": metadata, "create": True, "delete_existing": True}
    return _open(folder / name, options)


def open_for_writing(folder: Path, name: ArrayName) -> "ts.TensorStore":
    """Opens the TensorStore of an array that `create_array` made."""
    return _open(folder / name, {})


def write_array(
    array: "ts.TensorStore", start: int, values: np.ndarray, folder: Path
) -> None:
    """Write `values` from index `start` of a TensorStore, and wait until they are on
    disk."""
    try:
        array[start : start + len(values)].write(values).result()
    except (ValueError, OSError) as error:
        fix = "free some disk space, or check the folder and its permissions"
        raise make_array_error(folder, error, fix) from error


def open_for_reading(
    folders: Sequence[Place], name: ArrayName, cache_bytes: int
) -> "ts.TensorStore":
    """Opens the TensorStore of an array in pieces in `folders`, with a cache of
    `cache_bytes` decompressed bytes."""
    import tensorstore as ts

    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    # A finished store never changes, so what is cached need not be checked against the
    # disk.
    options = {"recheck_cached_data": False, "recheck_cached_metadata": False}
    pieces = []
    for folder in folders:
        place = join_place(folder, name)
        piece = _open(place, options, read=True, context=context)
        if name == "offsets" and pieces:
            # The first offset of a segment is the last of the one before it.
            piece = piece[1:]
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else ts.concat(pieces, axis=0)


def _open(
    path: Place,
    options: dict[str, Any],
    *,
    read: bool | None = None,
    context: "ts.Context | None" = None,
) -> "ts.TensorStore":
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
        return ts.open(spec | options, read=read, context=context).result()
    except (ValueError, OSError) as error:
        disk_fix = "check the disk, or build the store again with maxlm corpus build"
        fix = get_read_failure_fix(path, disk_fix)
        raise make_array_error(path, error, fix) from error


def make_array_error(
    path: Place, error: Exception, fix: str, message: str = "array error"
) -> MaxlmError:
    """Describes a TensorStore error in one line, without its source locations."""
    reason = str(error).split(" [")[0].splitlines()[0]
    return MaxlmError(f"{message}: {reason}", where=str(path), fix=fix)


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
        self.size = size
        self._read = read

    def __getitem__(self, key: slice | Int64s) -> Int64s:
        if isinstance(key, slice):
            key = slice(*key.indices(self.size))
        return self._read(key)

    def searchsorted(self, values: Int64s, side: Literal["right"]) -> Int64s:
        """Bisects as numpy's does: some log2(size / 2^12) chunks a value [n], most of
        them kept."""
        low = np.zeros_like(values)
        high = np.full_like(values, self.size)
        while True:
            unfinished = np.flatnonzero(low < high)
            if not unfinished.size:
                return low
            middle = (low[unfinished] + high[unfinished]) // 2
            is_below = self[middle] <= values[unfinished]
            low[unfinished[is_below]] = middle[is_below] + 1
            high[unfinished[~is_below]] = middle[~is_below]
