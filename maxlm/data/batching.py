"""Cuts a stream of items into lists of bounded size."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def batch_by_size(
    items: Iterable[Item],
    get_size: Callable[[Item], int],
    max_size: int,
    max_items: int | None = None,
) -> Iterator[list[Item]]:
    """Yields lists of items in order; the item by which a list reaches either limit is
    its last."""
    batch = list[Item]()
    size = 0
    for item in items:
        batch.append(item)
        size += get_size(item)
        if size >= max_size or len(batch) == max_items:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch
