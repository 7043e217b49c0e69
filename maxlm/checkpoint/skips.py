"""Batches that a run skips, and the batch that each step takes.

A run that rolls back skips the batches that led to it. They are recorded as ranges of
batch numbers, in the order in which they were found. The batch of any step follows from
them alone, so that a run which is resumed, on any machine, takes the same batches.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.runtime.collectives import run_on_process_0
from maxlm.runtime.files import replace_file
from maxlm.runtime.json_types import JsonMapping

BatchRange = tuple[int, int]
"""First and last batch skipped, counted from 0."""
Skips = tuple[BatchRange, ...]
_FILE = "skipped_batches.json"


def get_batch_index(step: int, skips: Sequence[BatchRange]) -> int:
    """Returns the number of the batch taken after ``step`` updates; without skips,
    ``step``."""
    skipped_batches = set[int]()
    for first, last in skips:
        skipped_batches |= {*range(first, last + 1)}
    # Ascending: each batch that is left out moves those after it down by one.
    batch = step
    for skipped_batch in sorted(skipped_batches):
        if skipped_batch <= batch:
            batch += 1
    return batch


def contiguous_ranges(
    start: int, stop: int, skips: Sequence[BatchRange]
) -> Iterator[tuple[int, int]]:
    """Yields (first batch, number of batches) for each range of consecutive batches
    taken by the updates after ``start`` to ``stop``."""
    while start < stop:
        batch = get_batch_index(start, skips)
        # Up to the next batch that is skipped, or the last update.
        count = stop - start
        for first, _ in skips:
            if first > batch:
                count = min(count, first - batch)
        yield batch, count
        start += count


def has_same_batches(
    step: int, skips: Sequence[BatchRange], other: Sequence[BatchRange]
) -> bool:
    """Returns whether ``step`` updates take the same batches under both."""
    return list(contiguous_ranges(0, step, skips)) == list(
        contiguous_ranges(0, step, other)
    )


def get_skips(metadata: JsonMapping) -> Skips:
    """Returns the batches that a checkpoint's run had skipped by then."""
    return tuple((first, last) for first, last in metadata.get("skipped_batches", ()))


def read_skips(folder: Path) -> Skips | None:
    """Returns the batches recorded in a run's folder, or None. Raises MaxlmError if
    damaged."""
    path = folder / _FILE

    def read() -> list[BatchRange] | None:
        if not path.exists():
            return None
        # JSON of any other form shows as one of these.
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            records = json.loads(path.read_text())
            ranges: Any = [tuple(record["batches"]) for record in records]
            if all(type(a) is type(b) is int and 0 <= a <= b for a, b in ranges):
                return ranges
        fix = 'rewrite it from the rollbacks in events.jsonl: [{"batches": [first, last]}]'
        raise MaxlmError("is no list of ranges of batches", where=str(path), fix=fix)

    record = run_on_process_0(read)
    return None if record is None else tuple((first, last) for first, last in record)


def record_skip(folder: Path, skips: Skips, skip: BatchRange, reason: str) -> None:
    """Adds a range to the record in a run's folder; ``skips`` are those known
    before."""
    path = folder / _FILE
    entries: list[dict[str, Any]]
    if path.exists():
        entries = json.loads(path.read_text())
    else:
        entries = [{"batches": batches} for batches in skips]
    entries.append({"batches": skip, "reason": reason})
    with replace_file(path) as temporary:
        temporary.write_text(f"{json.dumps(entries, indent=2)}\n")
