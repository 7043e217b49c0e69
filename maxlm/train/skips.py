"""Batches that a run skips, and the batch that each step takes.

A run that rolls back skips the batches that led to it. They are recorded as ranges of batch
numbers, in the order in which they were found. The batch of any step follows from them alone, so
that a run which is resumed, on any machine, takes the same batches.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.runtime.collectives import broadcast_from_process_0
from maxlm.runtime.files import replace_file

BatchRange = tuple[int, int]
"""First and last batch skipped, counted from 0."""
Skips = tuple[BatchRange, ...]
_FILE = "skipped_batches.json"


def _merge(skips: Sequence[BatchRange]) -> Iterator[BatchRange]:
    """Yields the same batches as sorted ranges that do not touch."""
    first, last = 0, -2
    for one, other in sorted(skips):
        if one > last + 1:
            if last >= first:
                yield first, last
            first, last = one, other
        last = max(last, other)
    if last >= first:
        yield first, last


def get_batch_number(step: int, skips: Sequence[BatchRange]) -> int:
    """Returns the number of the batch taken after ``step`` updates; without skips, ``step``."""
    number = step
    for first, last in _merge(skips):
        if first > number:
            break
        number += last - first + 1
    return number


def contiguous_ranges(
    start: int, stop: int, skips: Sequence[BatchRange]
) -> Iterator[tuple[int, int]]:
    """Yields (first batch, number of batches) for each range of consecutive batches taken by the
    updates after ``start`` to ``stop``."""
    step = start
    while step < stop:
        number = get_batch_number(step, skips)
        ends = [first - number for first, _ in skips if first > number]
        count = min([stop - step, *ends])
        yield number, count
        step += count


def has_same_batches(step: int, one: Sequence[BatchRange], other: Sequence[BatchRange]) -> bool:
    """Returns whether ``step`` updates take the same batches under both."""
    return list(contiguous_ranges(0, step, one)) == list(contiguous_ranges(0, step, other))


def get_skips(metadata: Mapping[str, Any]) -> Skips:
    """Returns the batches that a checkpoint's run had skipped by then."""
    return tuple((first, last) for first, last in metadata.get("skipped_batches", ()))


def read_skips(folder: Path) -> Skips | None:
    """Returns the batches recorded in a run's folder; None without a record.

    Raises:
        MaxlmError: the record is damaged.
    """
    path = folder / _FILE
    record = None
    if jax.process_index() == 0 and path.exists():
        try:
            record = [_parse_range(each["batches"]) for each in json.loads(path.read_text())]
        except (ValueError, TypeError, KeyError):
            record = "damaged"
    record = broadcast_from_process_0(record)
    if record == "damaged":
        fix = 'rewrite it from the rollbacks in events.jsonl: [{"batches": [first, last]}]'
        raise MaxlmError("is no list of ranges of batches", where=str(path), fix=fix)
    return None if record is None else tuple((first, last) for first, last in record)


def record_skip(folder: Path, skips: Skips, skip: BatchRange, reason: str) -> None:
    """Adds a range to the record in a run's folder; ``skips`` are those known before."""
    path = folder / _FILE
    known = json.loads(path.read_text()) if path.exists() else [{"batches": each} for each in skips]
    with replace_file(path) as temporary:
        entries = [*known, {"batches": skip, "reason": reason}]
        temporary.write_text(f"{json.dumps(entries, indent=2)}\n")


def _parse_range(written: Any) -> BatchRange:
    """
    Raises:
        ValueError, TypeError: not a first and a last batch.
    """
    first, last = written
    if not all(type(n) is int for n in (first, last)) or not 0 <= first <= last:
        raise ValueError(written)
    return first, last
