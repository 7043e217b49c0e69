"""Repeated passages of one document: which of its words to cut, given what kept
documents hold.

A window is a run of so many words (`stages.substring`). Windows are the same if their
characters are, and such windows have one *source*: the document and the word where the
corpus has them first. Windows that follow each other have sources that do so too, so
sets of them are intervals of source words.

All places are counted in words: window w covers the words w, w + 1, ..., w + size - 1.
All intervals are [start, stop).
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class RepeatedRun:
    """Windows of a document, one after the other, that have sources one after the
    other."""

    word: int
    """The first window."""
    windows: int
    document: int
    """The document of the sources."""
    source_word: int
    """The source of the first window."""

    @property
    def source_stop(self) -> int:
        """The word behind the source of the last window."""
        return self.source_word + self.windows


class WindowIndex:
    """A set of windows by their sources, each with one place where it stands."""

    def __init__(self) -> None:
        # By document of the sources: intervals that are apart, rising, with the place
        # of the first.
        self._intervals: dict[int, list[tuple[int, int, int]]] = {}

    def find(self, document: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Finds the windows of the set with sources in an interval: intervals of
        sources, and the place of the first window of each."""
        intervals = self._intervals.get(document)
        if not intervals:
            return []
        # The last that begins at `start` or before: others before it end before it.
        num_before = bisect_right(intervals, start, key=lambda interval: interval[0])
        overlaps = []
        for i in range(max(0, num_before - 1), len(intervals)):
            begin, end, place = intervals[i]
            if begin >= stop:
                break
            low = max(begin, start)
            high = min(end, stop)
            if low < high:
                overlaps.append((low, high, place + low - begin))
        return overlaps

    def add(self, document: int, start: int, stop: int, place: int) -> None:
        """Adds the windows with sources in an interval that stand from `place` on;
        those that the set has stay where they are."""
        missing = []
        begin = start
        for low, high, _ in self.find(document, start, stop):
            missing.append((begin, low))
            begin = high
        missing.append((begin, stop))
        intervals = self._intervals.setdefault(document, [])
        for low, high in missing:
            if low < high:
                insort(intervals, (low, high, place + low - start))


class SpanSet:
    """A set of words, as spans that are apart."""

    def __init__(self, spans: Iterable[Span] = ()):
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in spans:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Adds the words of a span."""
        if start >= stop:
            return
        # Those that overlap or touch it.
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def list_spans(self) -> list[Span]:
        """Lists the spans, rising."""
        return list(zip(self._starts, self._stops, strict=True))

    def overlaps(self, start: int, stop: int) -> bool:
        """Tells whether the set has a word of a span."""
        index = bisect_right(self._stops, start)
        return index < len(self._starts) and self._starts[index] < stop

    def find_windows_outside(self, start: int, stop: int, size: int) -> list[Span]:
        """Finds the windows of `size` words, of those that begin in [start, stop), of
        which the set has no word."""
        windows = []
        begin = start
        for index in range(bisect_right(self._stops, start), len(self._starts)):
            end = min(stop, self._starts[index] - size + 1)
            if begin < end:
                windows.append((begin, end))
            begin = max(begin, self._stops[index])
            if begin >= stop:
                break
        if begin < stop:
            windows.append((begin, stop))
        return windows


def find_shared_spans(
    runs: Sequence[RepeatedRun], kept_windows: WindowIndex, size: int
) -> list[Span]:
    """Finds what a document has in common with kept ones: spans of its words, each of
    which stands in one piece in what stays of one of these; they may overlap."""
    spans = []
    for run in runs:
        for low, high, _ in kept_windows.find(
            run.document, run.source_word, run.source_stop
        ):
            start = run.word + low - run.source_word
            num_windows = high - low
            spans.append((start, start + num_windows - 1 + size))
    return spans


def find_inner_spans(
    runs: Sequence[RepeatedRun], size: int, cut: SpanSet, needed: SpanSet
) -> list[Span]:
    """Finds what a document repeats of itself: spans of its words, each of which stands
    in one piece further to the left, apart from it.

    From left to right, a window is cut if it stands on the left, with no word of it
    cut. A window ends before any that it is the copy of begins, so what is cut later
    leaves it whole.

    Args:
        runs: the document's repeats, from left to right.
        size: words of a window.
        cut: words that are cut; those of the spans found are added.
        needed: words that must stay; those for which the spans are cut are added.
    """
    spans = []
    left = WindowIndex()
    for run in runs:
        for low, high, place in left.find(
            run.document, run.source_word, run.source_stop
        ):
            start = run.word + low - run.source_word
            distance = start - place
            # Of windows on the left that end before the first copy begins, which may be
            # cut now.
            count = min(high - low, distance - size + 1)
            if count <= 0:
                continue
            for first, stop in cut.find_windows_outside(place, place + count, size):
                begin = first + distance
                end = stop - 1 + distance + size
                if not needed.overlaps(begin, end):
                    spans.append((begin, end))
                    cut.add(begin, end)
                    needed.add(first, stop - 1 + size)
        for first, stop in cut.find_windows_outside(
            run.word, run.word + run.windows, size
        ):
            offset = first - run.word
            source = run.source_word + offset
            left.add(run.document, source, source + stop - first, first)
    return spans


def add_intact_windows(
    runs: Sequence[RepeatedRun], kept_windows: WindowIndex, size: int, cut: SpanSet
) -> None:
    """Adds to the windows of kept documents those of one more, of which no word is
    cut."""
    for run in runs:
        for first, stop in cut.find_windows_outside(
            run.word, run.word + run.windows, size
        ):
            source = run.source_word + first - run.word
            kept_windows.add(run.document, source, source + stop - first, first)


def choose_cover(spans: Iterable[Span]) -> list[Span]:
    """Chooses of spans as few as cover the same words, rising: of those that begin
    where the words covered so far end or before, the one that reaches furthest."""
    chosen: list[Span] = []
    covered = -1
    candidate: Span | None = None
    for start, stop in sorted(spans, key=lambda span: (span[0], -span[1])):
        if candidate is not None and start > covered:
            chosen.append(candidate)
            covered = candidate[1]
            candidate = None
        if stop > covered and (candidate is None or stop > candidate[1]):
            candidate = (start, stop)
    if candidate is not None:
        chosen.append(candidate)
    return chosen
