"""Accounts for a run's wall time, from its events.

The events of ``events.jsonl`` are those of several attempts, each one start of the
program. Time is cut without a gap, from the first attempt's beginning to the last sign
of life; so the parts sum to the whole by construction.

A step is productive if the run as it stands holds its update. An attempt's steps past
the one that a later attempt resumed from, or a rollback restored, are lost: their time
is estimated pro rata of the steps between two ``progress`` events.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import inf

from maxlm.runtime.json_types import JsonMapping

Event = JsonMapping

PARTS = (
    "productive",
    "lost",
    "starting",
    "compiling",
    "loading",
    "generating",
    "saving",
    "evaluating",
    "hanging",
    "other",
    "down",
    "finished",
)
"""``lost``: steps past the checkpoint that was resumed from. ``starting``: from the
process's start to the start event. ``hanging``: found by the watchdog. ``other``:
alive, and none of these. ``generating``: rollouts. ``down``: between attempts. ``finished``: between the end of a
finished run and its next attempt."""

SILENCE = 60.0
"""An attempt that has not said that it stopped, and was heard of less than so many
seconds ago, is running."""


@dataclass(frozen=True)
class Attempt:
    """One start of the program."""

    began: float
    ended: float
    """Time of its last sign of life, unix seconds; now, if it is running."""
    first_step: int
    """The step that it went on from."""
    last_step: int
    end: str
    """A reason of the ``stop`` event, ``hang`` after one, ``killed`` without either, or
    ``running``."""
    devices: int | None
    points: tuple[tuple[float, int], ...]
    """(unix seconds, step reached), as far as events tell; a rollback goes back."""


@dataclass(frozen=True)
class TimeSlice:
    """An interval of a run's life, in which nothing is known of the order of its
    parts."""

    begin: float
    end: float
    """Unix seconds."""
    seconds_by_activity: Mapping[str, float]
    """Seconds of those of `PARTS` that it has; they sum to its length."""


@dataclass(frozen=True)
class RunHistory:
    """A run's attempts and what its time was spent on."""

    attempts: tuple[Attempt, ...]
    slices: tuple[TimeSlice, ...]
    """All time from the first attempt's beginning on, without a gap."""
    event_counts: Mapping[str, int]
    """Events by kind."""

    @cached_property
    def seconds_by_activity(self) -> dict[str, float]:
        """Seconds of each of `PARTS`."""
        totals: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for piece in self.slices:
            for part, seconds in piece.seconds_by_activity.items():
                totals[part] += seconds
        return totals

    @property
    def wall_seconds(self) -> float:
        """Seconds from the first attempt's beginning to the last sign of life."""
        if not self.attempts:
            return 0.0
        return self.attempts[-1].ended - self.attempts[0].began

    @property
    def goodput(self) -> float | None:
        """The share of time that is productive; what passed while the run was finished
        is left out. None: no time has passed."""
        seconds = self.seconds_by_activity
        running_seconds = self.wall_seconds - seconds["finished"]
        if running_seconds <= 0:
            return None
        return seconds["productive"] / running_seconds

    @property
    def interruptions(self) -> dict[str, int]:
        """Ends of attempts that are neither done nor running, by cause."""
        ends = [attempt.end for attempt in self.attempts]
        return dict(Counter(end for end in ends if end not in ("done", "running")))

    @property
    def mean_time_to_interruption(self) -> float | None:
        """Seconds that attempts ran, over their interruptions; None: there were
        none."""
        count = sum(self.interruptions.values())
        if not count:
            return None
        return sum(attempt.ended - attempt.began for attempt in self.attempts) / count


def summarize_run_events(
    events: Iterable[Event], now_unix_seconds: float
) -> RunHistory:
    """Accounts for a run's time, from its events in the order they were written; at
    ``now_unix_seconds`` the last attempt may still be alive."""
    counts: Counter[str] = Counter()
    logs: list[list[Event]] = []
    for event in events:
        counts[event["event"]] += 1
        if event["event"] in ("start", "resume"):
            logs.append([])
        if logs:
            logs[-1].append(event)
    attempts: list[Attempt] = []
    slices: list[TimeSlice] = []
    for log, kept_steps in zip(logs, _find_kept_steps(logs), strict=True):
        previous = attempts[-1] if attempts else None
        earliest = previous.ended if previous else -inf
        now = now_unix_seconds if log is logs[-1] else inf
        attempt, attempt_slices = _account(log, kept_steps, earliest, now)
        if previous:
            part = "finished" if previous.end == "done" else "down"
            slices.append(_fill(previous.ended, attempt.began, {part: inf}))
        slices += attempt_slices
        attempts.append(attempt)
    return RunHistory(tuple(attempts), tuple(slices), counts)


def _find_kept_steps(logs: Sequence[Sequence[Event]]) -> list[list[float]]:
    """Finds, for the beginning of each attempt and each of its rollbacks, the step up
    to which the run keeps its steps: the least that any later one began from."""
    least = inf
    result = []
    for log in reversed(logs):
        spans = []
        begins = [
            event["step"]
            for event in log
            if event["event"] in ("start", "resume", "rollback")
        ]
        for begin in reversed(begins):
            spans.append(least)
            least = min(least, begin)
        result.append(spans[::-1])
    return result[::-1]


def _account(
    log: Sequence[Event],
    kept_steps: Sequence[float],
    earliest: float,
    now: float,
) -> tuple[Attempt, list[TimeSlice]]:
    """Reads an attempt, which begins at ``earliest`` or later, and what its time was
    spent on: from its start event on cut at every ``progress``, whose seconds since the
    one before fill what lies between."""
    start = log[0]
    # Another host's clock may be behind: time never goes back here.
    began = max(min(start.get("began", inf), start["time"]), earliest)
    times = list(accumulate((event["time"] for event in log), max, initial=began))[1:]
    ended = times[-1]
    hung = log[-1]["event"] == "hang"
    stops = [str(event.get("reason")) for event in log if event["event"] == "stop"]
    if stops:
        end = stops[-1]
    elif hung:
        end = "hang"
    else:
        end = "killed"
    if end == "killed" and now - ended < SILENCE:
        end = "running"
        ended = max(ended, now)
    slices = [_fill(began, times[0], {"starting": inf})]
    points: list[tuple[float, int]] = []
    begin = times[0]  # of the slice that the next ``progress`` ends
    done = start["step"]  # the step up to which slices account for the steps
    last = 0
    # The step up to which the run still holds the steps, until the next rollback.
    limits = iter(kept_steps)
    limit = next(limits)
    # As of the last ``progress``: seconds by activity, cumulative.
    totals = dict.fromkeys(
        ("stepping", "loading", "generating", "saving", "evaluating"), 0.0
    )
    # Of events since then that tell their own seconds.
    once = {"compiling": 0.0, "hanging": 0.0}
    final = 0.0
    for time, event in zip(times, log, strict=True):
        kind = event["event"]
        step = event["step"]
        seconds = event.get("seconds", 0.0)
        # Steps only grow, but at a rollback: a late event may name less.
        last = max(last, step)
        if kind == "rollback":
            points.append((time, max(last, event.get("from_step", 0))))
        points.append((time, step if kind == "rollback" else last))
        if kind == "compiled":
            once["compiling"] += seconds
            done = max(done, step)
        elif kind == "hang":
            once["hanging"] += seconds
        elif kind == "evaluate" and event.get("final"):  # No ``progress`` follows.
            final = seconds
        elif kind == "rollback":  # Right after a ``progress``; the next counts anew.
            done = step
            last = step
            limit = next(limits)
            totals = dict.fromkeys(totals, 0.0)
        elif kind == "progress":
            # Each only grows; an event of an older version lacks some.
            spent = {
                name: max(0.0, event.get(name, 0.0) - total)
                for name, total in totals.items()
            }
            totals = {name: total + spent[name] for name, total in totals.items()}
            # The share of the steps since that the run still holds.
            share = float(limit > done)
            if step > done:
                share = min(1.0, max(0.0, limit - done) / (step - done))
            done = max(done, step)
            stepping = spent.pop("stepping")
            spent |= {
                "productive": stepping * share,
                "lost": stepping * (1 - share),
                **once,
            }
            slices.append(_fill(begin, time, spent))
            begin = time
            once = dict.fromkeys(once, 0.0)
    slices.append(_fill(begin, ended, once | {"evaluating": final}))
    devices = start.get("devices")
    attempt = Attempt(began, ended, start["step"], last, end, devices, tuple(points))
    return attempt, slices


def _fill(begin: float, end: float, parts: Mapping[str, float]) -> TimeSlice:
    """Makes a slice with as much of each part as there is room for, in the order of
    `PARTS` reversed; what is over is ``other``."""
    left = end - begin
    seconds: dict[str, float] = {}
    for part in reversed(PARTS):
        taken = min(left, parts.get(part, 0.0))
        if taken:
            seconds[part] = taken
        left -= taken
    if left:
        seconds["other"] = seconds.get("other", 0.0) + left
    return TimeSlice(begin, end, seconds)
