"""Progress of long work: a bar on a terminal, plain lines with rate and ETA
elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called as (stage, amount done, amount in all)."""

_SECONDS_BETWEEN_LINES = 5.0


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def show_progress(unit: str = "B") -> Iterator[Progress]:
    """Makes a `Progress` that shows itself on stderr; `unit` is what the amounts
    count."""
    if not sys.stderr.isatty():
        yield _make_line_progress(unit)
        return
    from rich import progress as rich_progress
    from rich.console import Console

    amounts: list[rich_progress.ProgressColumn] = [rich_progress.MofNCompleteColumn()]
    if unit == "B":
        amounts = [rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn()]
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        *amounts,
        rich_progress.TimeRemainingColumn(),
    )
    tasks: dict[str, rich_progress.TaskID] = {}
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def _make_line_progress(unit: str) -> Progress:
    """Makes a `Progress` that prints a line every few seconds, and one at the end."""
    # By stage: the time of its first call and what was done by then, and the time of
    # its last line.
    first_calls: dict[str, tuple[float, int]] = {}
    last_lines: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        # What an earlier run had finished is not to count as speed.
        start, done_before = first_calls.setdefault(stage, (now, done))
        seconds_since_line = now - last_lines.get(stage, start)
        if done < total and seconds_since_line < _SECONDS_BETWEEN_LINES:
            return
        last_lines[stage] = now
        rate = (done - done_before) / max(now - start, 1e-9)  # A clock may not move.
        if unit == "B":
            amounts = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
            speed = f"{rate / 1e6:.2f} MB/s"
        else:
            amounts = f"{done:,} of {total:,} {unit}"
            speed = f"{rate:.2f} {unit}/s"
        line = f"{stage}: {amounts}, {speed}"
        if rate and done < total:
            line += f", {(total - done) / rate:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    return progress
