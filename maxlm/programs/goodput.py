"""Accounts for a run's wall time, from its events.

The events of ``events.jsonl`` are those of several attempts, each one start of the program. Time is
cut into spans that join without a gap, from the first attempt's beginning to the last sign of life;
so the parts sum to the whole by construction.

A step is productive if the run as it stands holds its update. An attempt's steps past the one that
a later attempt resumed from, or a rollback restored, are lost: their time is estimated pro rata of
the steps between two ``progress`` events.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, TypeGuard

Event = Mapping[str, Any]

PARTS: tuple[str, ...] = (
    "productive",
    "lost",
    "starting",
    "compiling",
    "loading",
    "saving",
    "evaluating",
    "hanging",
    "other",
    "down",
    "finished",
)
"""``lost``: steps past the checkpoint that was resumed from. ``starting``: from the process's start
to the start event. ``hanging``: found by the watchdog. ``other``: alive, and none of these.
``down``: between attempts. ``finished``: between the end of a finished run and its next attempt."""

# An attempt that has not said that it stopped, and was heard of so many seconds ago, is running.
SILENCE = 60.0


@dataclass(frozen=True)
class Span:
    """A stretch of time, unix seconds, spent on one of `PARTS`."""

    begin: float
    end: float
    part: str


@dataclass(frozen=True)
class Stretch:
    """Steps taken one after the other, without going back."""

    points: tuple[tuple[float, float], ...]
    """(unix seconds, step), as far as events tell."""
    kept: float
    """The step up to which they are part of the run; infinite: all."""


@dataclass(frozen=True)
class Attempt:
    """One start of the program."""

    began: float
    ended: float
    """Its last sign of life, unix seconds; now, if it is running."""
    first_step: int
    """That it went on from."""
    last_step: int
    end: str
    """A reason of the ``stop`` event, ``hang`` after one, ``killed`` without either, or
    ``running``."""
    devices: int | None
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True)
class History:
    """A run's attempts and what its time was spent on."""

    attempts: tuple[Attempt, ...]
    spans: tuple[Span, ...]
    """In order, without gaps."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Events by kind."""

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each of `PARTS`."""
        totals = dict.fromkeys(PARTS, 0.0)
        for span in self.spans:
            totals[span.part] += span.end - span.begin
        return totals

    @property
    def wall(self) -> float:
        """Seconds from the first attempt's beginning to the last sign of life."""
        return self.spans[-1].end - self.spans[0].begin if self.spans else 0.0

    @property
    def goodput(self) -> float | None:
        """The share of time that is productive; what passed while the run was finished is left
        out. None: no time has passed."""
        seconds = self.seconds
        wanted = self.wall - seconds["finished"]
        return seconds["productive"] / wanted if wanted > 0 else None

    @property
    def interruptions(self) -> dict[str, int]:
        """Ends of attempts that are neither done nor running, by cause."""
        return dict(Counter(a.end for a in self.attempts if a.end not in ("done", "running")))

    @property
    def mean_time_to_interruption(self) -> float | None:
        """Seconds that attempts ran, over their interruptions; None: there were none."""
        ends = sum(self.interruptions.values())
        return sum(a.ended - a.began for a in self.attempts) / ends if ends else None


def summarize_events(events: Iterable[Event], now: float) -> History:
    """Accounts for a run's time, from its events.

    Args:
        events: in the order they were written; malformed ones are skipped.
        now: unix seconds; the last attempt may still be alive.
    """
    counts: Counter[str] = Counter()
    logs: list[list[Event]] = []
    for event in events:
        kind = event.get("event")
        if not isinstance(kind, str) or not all(_is_number(event.get(k)) for k in ("time", "step")):
            continue
        counts[kind] += 1
        if kind in ("start", "resume"):
            logs.append([])
        if logs:
            logs[-1].append(event)
    attempts: list[Attempt] = []
    spans: list[Span] = []
    kept = _kept(logs)
    for number, log in enumerate(logs):
        before = attempts[-1] if attempts else None
        attempt, own = _attempt(log, kept[number], before, now if log is logs[-1] else inf)
        if before and attempt.began > before.ended:
            part = "finished" if before.end == "done" else "down"
            spans.append(Span(before.ended, attempt.began, part))
        attempts.append(attempt)
        spans += own
    return History(tuple(attempts), tuple(spans), dict(counts))


def _kept(logs: Sequence[Sequence[Event]]) -> list[list[float]]:
    """For each stretch of each attempt, the step up to which the run holds it: the least that any
    later one began from."""
    least, result = inf, []
    for log in reversed(logs):
        own = []
        begins = [e["step"] for e in log if e["event"] in ("start", "resume", "rollback")]
        for begin in reversed(begins):
            own.append(least)
            least = min(least, begin)
        result.append(own[::-1])
    return result[::-1]


def _attempt(
    log: Sequence[Event], kept: Sequence[float], before: Attempt | None, now: float
) -> tuple[Attempt, list[Span]]:
    start = log[0]
    # Another host's clock may be behind: time never goes back here.
    earliest = before.ended if before else -inf
    began = max(min(_number(start, "began", inf), start["time"]), earliest)
    times, latest = [], began
    for event in log:
        latest = max(latest, event["time"])
        times.append(latest)
    stops = [str(event.get("reason")) for event in log if event["event"] == "stop"]
    hung = log[-1]["event"] == "hang"
    end = stops[-1] if stops else "hang" if hung else "killed"
    if not stops and not hung and now - latest < SILENCE:
        end, latest = "running", max(latest, now)
    stretches = tuple(_stretches(log, times, kept))
    attempt = Attempt(
        began=began,
        ended=latest,
        first_step=start["step"],
        last_step=int(stretches[-1].points[-1][1]),
        end=end,
        devices=start.get("devices"),
        stretches=stretches,
    )
    return attempt, list(_spans(log, times, kept, attempt))


def _stretches(
    log: Sequence[Event], times: Sequence[float], kept: Sequence[float]
) -> Iterator[Stretch]:
    points: list[tuple[float, float]] = []
    limits = iter(kept)
    for time, event in zip(times, log, strict=True):
        if event["event"] == "rollback":
            reached = max(_number(event, "from_step", 0), points[-1][1])
            yield Stretch((*points, (time, reached)), next(limits))
            points = []
        # Steps only grow in a stretch: a late event may name an earlier one.
        points.append((time, max([event["step"], *(step for _, step in points[-1:])])))
    yield Stretch(tuple(points), next(limits))


def _spans(
    log: Sequence[Event], times: Sequence[float], kept: Sequence[float], attempt: Attempt
) -> Iterator[Span]:
    """The attempt's time, cut at its start event and at every ``progress``, whose seconds since the
    one before fill what lies between in a fixed order."""
    yield from _filled(attempt.began, times[0], {"starting": inf})
    work = _Work(log[0]["step"], kept)
    known = dict.fromkeys(("stepping", "loading", "saving", "evaluating"), 0.0)
    once, final = {"compiling": 0.0, "hanging": 0.0}, 0.0
    begin = times[0]
    for time, event in zip(times, log, strict=True):
        kind = event["event"]
        if kind == "compiled":
            once["compiling"] += _seconds(event, "seconds")
            work.reach(event["step"])
            work.settle()
        elif kind == "hang":
            once["hanging"] += _seconds(event, "seconds")
        elif kind == "evaluate" and event.get("final"):  # No ``progress`` follows.
            final = _seconds(event, "seconds")
        elif kind == "rollback":
            work.reach(_number(event, "from_step", 0))
            work.go_back(event["step"])
            known = dict.fromkeys(known, 0.0)  # ``progress`` counts anew from here.
        elif kind == "progress":
            work.reach(event["step"])
            # Each only grows; an event that lacks one says nothing new of it.
            now = {name: max(old, _seconds(event, name)) for name, old in known.items()}
            spent = {name: now[name] - old for name, old in known.items()}
            share, known = work.settle(), now
            stepping = spent.pop("stepping")
            spent |= {"productive": stepping * share, "lost": stepping * (1 - share), **once}
            yield from _filled(begin, time, spent)
            begin, once = time, dict.fromkeys(once, 0.0)
    yield from _filled(begin, attempt.ended, once | {"evaluating": final})


class _Work:
    """An attempt's updates by their number in it, which grows where steps go back."""

    def __init__(self, step: int, kept: Sequence[float]):
        self._limits = iter(kept)
        self._step, self._limit = step, next(self._limits)
        self._taken = self._good = 0.0

    def reach(self, step: float) -> None:
        """Steps up to this one were taken."""
        if step > self._step:
            self._taken += step - self._step
            self._good += max(0.0, min(step, self._limit) - self._step)
            self._step = step

    def go_back(self, step: int) -> None:
        self._step, self._limit = step, next(self._limits)

    def settle(self) -> float:
        """The share of steps since the last call that the run holds; without any, of the next."""
        share = self._good / self._taken if self._taken else float(self._limit > self._step)
        self._taken = self._good = 0.0
        return share


def _filled(begin: float, end: float, parts: Mapping[str, float]) -> Iterator[Span]:
    """Spans from ``begin`` to ``end``: as much of each part as there is room for, in the order of
    `PARTS` reversed, but what is over, ``other``, last."""
    for part in reversed(PARTS):
        until = min(end, begin + parts.get(part, 0.0))
        if until > begin:
            yield Span(begin, until, part)
            begin = until
    if end > begin:
        yield Span(begin, end, "other")


def _seconds(event: Event, key: str) -> float:
    return max(0.0, _number(event, key, 0.0))


def _number(event: Event, key: str, default: float) -> float:
    value = event.get(key)
    return value if _is_number(value) else default


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
