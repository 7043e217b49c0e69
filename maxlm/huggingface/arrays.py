"""Arrays of checkpoints, read and written slice by slice in bounded memory
(TensorStore, zarr3).

A slice is what belongs to one layer (and one expert). It lies in files of its own of at
most ``FILE_BYTES``, each cut into tiles that are compressed apart: whoever restores one
device's share of it, along whichever axis, reads and decodes little else.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike

from maxlm.config import MaxlmError

if TYPE_CHECKING:  # TensorStore is loaded where an array is opened
    from tensorstore import TensorStore

FILE_BYTES = 16 << 20
TILE_BYTES = 1 << 20
_WRITING = "free disk space or fix permissions, then rerun"
_OPEN = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}

Shape = tuple[int, ...]
Box = tuple[slice, ...]
T = TypeVar("T")


class ZarrArray:
    """A stored array; :func:`create` or :func:`open_array` makes it."""

    def __init__(self, store: "TensorStore", where: str):
        self._store = store
        self._where = where
        self.shape: Shape = tuple(store.shape)
        self.dtype: np.dtype = store.dtype.numpy_dtype
        layout = store.chunk_layout
        self.shard_shape = cast(Shape, tuple(layout.write_chunk.shape or ()))
        self.chunk_shape = cast(Shape, tuple(layout.read_chunk.shape or ()))
        """Shape of a tile, the least that can be decoded."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, lead_index: Shape = ()) -> np.ndarray:
        """Reads the slice at some leading indices."""
        num_lead = len(lead_index)
        values = np.empty(self.shape[num_lead:], self.dtype)
        stored = self._store[lead_index] if lead_index else self._store
        with _explain(self._where):
            boxes = split_into_boxes(values.shape, self.shard_shape[num_lead:])
            # A read begins when the generator makes it: `_few_at_once` says when.
            reads = ((box, stored[box].read()) for box in boxes)
            for box, reading in _few_at_once(reads, values.nbytes):
                values[box] = reading.result()
        return values

    def read_box(self, box: Box) -> np.ndarray:
        """Reads any part; decodes all tiles that it touches at once."""
        with _explain(self._where):
            return self._store[box].read().result()

    def write(self, lead_index: Shape, values: np.ndarray) -> None:
        """Writes the slice at some leading indices, and waits for the disk."""
        num_lead = len(lead_index)
        assert values.shape == self.shape[num_lead:]
        stored = self._store[lead_index] if lead_index else self._store
        with _explain(self._where, _WRITING):
            boxes = split_into_boxes(values.shape, self.shard_shape[num_lead:])
            writes = (stored[box].write(values[box]) for box in boxes)
            for writing in _few_at_once(writes, values.nbytes):
                writing.result()


def split_into_boxes(shape: Shape, box_shape: Shape) -> Iterator[Box]:
    """Yields the parts of a grid over ``shape``, in C order; one, of no axes, for a
    scalar."""
    sides = list(zip(shape, box_shape, strict=True))
    axes = [range(0, size, width) for size, width in sides]
    for starts in product(*axes):
        box: list[slice] = []
        for start, (size, width) in zip(starts, sides, strict=True):
            # The last box of an axis may be narrower.
            box.append(slice(start, min(start + width, size)))
        yield tuple(box)


def create_array(
    folder: Path,
    shape: Shape,
    num_lead_axes: int,
    dtype: DTypeLike = np.float32,
) -> ZarrArray:
    """Returns a new array, written whole, in slices at ``num_lead_axes`` leading
    indices."""
    tile_in_slice, file_in_slice = choose_chunk_and_shard_shapes(
        shape[num_lead_axes:], np.dtype(dtype).itemsize
    )
    # A file holds nothing of two slices.
    one_slice = (1,) * num_lead_axes
    tile = one_slice + tile_in_slice
    file = one_slice + file_in_slice
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 1}},
    ]
    index_codecs = [codecs[0], {"name": "crc32c"}]
    sharding = {"chunk_shape": tile, "codecs": codecs, "index_codecs": index_codecs}
    metadata = {
        "shape": shape,
        "data_type": np.dtype(dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    store = {"driver": "file", "path": f"{folder.resolve()}/"}
    with _explain(str(folder), _WRITING):
        created = _open(store, {"metadata": metadata, "create": True})
        return ZarrArray(created, str(folder))


def open_array(folder: Path, name: str) -> ZarrArray:
    """Opens an array of a checkpoint's state, whether one file holds many (OCDBT) or
    not; bfloat16 is read as float32."""
    import tensorstore as ts

    store: dict[str, Any] = {"driver": "file", "path": f"{folder.resolve()}/"}
    if (folder / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": store, "path": f"{name}/"}
    else:
        store["path"] += f"{name}/"
    where = str(folder / name)
    with _explain(where):
        opened = _open(store, {})
        if opened.dtype == ts.bfloat16:
            opened = ts.cast(opened, ts.float32)
        return ZarrArray(opened, where)


def choose_chunk_and_shard_shapes(
    shape: Shape, itemsize: int = 4
) -> tuple[Shape, Shape]:
    """Returns shapes of the tiles and of the files of a slice; a file is made of whole
    tiles. ``itemsize``: bytes of a number."""
    tile = _halved(shape, TILE_BYTES // itemsize)
    # Tiles along each axis, rounded up: of the slice, then of a file.
    counts = tuple(-(-size // width) for size, width in zip(shape, tile, strict=True))
    most_tiles = FILE_BYTES // itemsize // math.prod(tile)
    counts = _halved(counts, most_tiles)
    file = tuple(width * count for width, count in zip(tile, counts, strict=True))
    return tile, file


def _halved(shape: Sequence[int], most: int) -> Shape:
    """``shape``, its longest side halved until it holds no more than ``most``."""
    sides = [max(1, side) for side in shape]
    while math.prod(sides) > max(1, most):
        longest = sides.index(max(sides))
        sides[longest] = -(-sides[longest] // 2)
    return tuple(sides)


def _open(location: dict[str, Any], options: dict[str, Any]) -> "TensorStore":
    import tensorstore as ts

    # TensorStore would keep no decoded tiles anyway, but read as many files at once as
    # it can.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    spec = {"driver": "zarr3", "kvstore": location}
    return ts.open(spec | _OPEN | options, context=context).result()


def _few_at_once(tasks: Iterator[T], nbytes: int) -> Iterator[T]:
    """Yields what an iterator begins, in order, at most an eighth of ``nbytes`` ahead.

    TensorStore holds each file twice while it is on its way, as values and compressed.
    """
    num_files = nbytes // (8 * FILE_BYTES)
    most_in_flight = max(1, min(num_files, os.cpu_count() or 1))
    in_flight: deque[T] = deque()
    for task in tasks:
        in_flight.append(task)
        if len(in_flight) >= most_in_flight:
            yield in_flight.popleft()
    yield from in_flight


@contextmanager
def _explain(
    where: str, fix: str = "check the disk, or use another checkpoint"
) -> Iterator[None]:
    """TensorStore fails in many ways: all become one kind of error, without its source
    lines."""
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        # Behind " [" stand TensorStore's source lines.
        lines = str(error).split(" [")[0].splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise MaxlmError(f"array error: {reason}", where=where, fix=fix) from error
