"""A run's history as an image: the steps it reached, and what its time was spent on."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maxlm.config import MaxlmError
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.train.goodput import PARTS, RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Progress is one calm colour, lost steps and downtime are loud.
_COLOURS = {
    "productive": "#59A14F",
    "lost": "#E15759",
    "starting": "#BAB0AC",
    "compiling": "#76B7B2",
    "loading": "#F28E2B",
    "generating": "#EDC948",
    "saving": "#4E79A7",
    "evaluating": "#B07AA1",
    "hanging": "#9C2F2F",
    "other": "#D7D3CF",
    "down": "#3B3B3B",
    "finished": "#FFFFFF",
}
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
"""Seconds and names of units of time, the longest first."""
_FORMATS = (".png", ".svg", ".pdf")
NUM_COLUMNS = 240
"""Columns of the lower panel: one is about two points wide."""
_MAX_LABELLED_ATTEMPTS = 12
"""The ends of more attempts are marked without words, which would overlap."""
_LATE_SHARE = 0.85
"""A label of an end later than this share of the time lies left of its mark."""


def draw_history(history: RunHistory, image: Path, *, title: str) -> None:
    """Draws a history: above, the steps reached, with a mark at each interruption;
    below, column by column, the shares of time. Times are from the beginning of the
    first attempt on.

    Args:
        image: file to write, .png, .svg or .pdf; its folder is made if missing.

    Raises MaxlmError: another suffix, a run that has not begun, a file that cannot be
    written.
    """
    if image.suffix not in _FORMATS:
        message = f"no image format has the suffix {image.suffix!r}"
        raise MaxlmError(message, where=str(image), fix=f"use {', '.join(_FORMATS)}")
    if history.wall_seconds <= 0:
        raise MaxlmError(
            "no time to draw", where=title, fix="wait for the run to begin"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds_per_unit, unit_name = _choose_unit(history.wall_seconds)
    figure = Figure(figsize=(10, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    sizes = {"height_ratios": [3, 1.4]}
    steps_axes, shares_axes = figure.subplots(2, sharex=True, gridspec_kw=sizes)
    _draw_steps(steps_axes, history, seconds_per_unit)
    titles = [title] if title else []
    if history.goodput is not None:
        titles.append(f"goodput {history.goodput:.1%}")
    steps_axes.set_title(" · ".join(titles), loc="left", fontsize=11)
    _draw_shares(shares_axes, history, seconds_per_unit)
    shares_axes.set_xlabel(f"{unit_name} since the run began")
    for axes in (steps_axes, shares_axes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    with convert_write_errors(image.parent):
        image.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(image) as temporary:
        figure.savefig(temporary, format=image.suffix.removeprefix("."))


def _choose_unit(wall_seconds: float) -> tuple[float, str]:
    """Returns the seconds and the name of the unit to count a run's time in."""
    for seconds_per_unit, name in _UNITS:
        # Two of the unit at least: fewer would be read as fractions.
        if wall_seconds >= 2 * seconds_per_unit:
            return seconds_per_unit, name
    return _UNITS[-1]


def _draw_steps(axes: "Axes", history: RunHistory, seconds_per_unit: float) -> None:
    """Draws the steps that each attempt reached, and a mark at each interruption."""
    run_began = history.attempts[0].began
    for attempt in history.attempts:
        times = [(time - run_began) / seconds_per_unit for time, _ in attempt.points]
        steps = [step for _, step in attempt.points]
        axes.plot(times, steps, color=_COLOURS["productive"], linewidth=2)
        if attempt.end in ("done", "running"):
            continue
        seconds_to_end = attempt.ended - run_began
        end = (seconds_to_end / seconds_per_unit, attempt.last_step)
        axes.plot(
            *end,
            marker="x",
            clip_on=False,
            color=_COLOURS["down"],
            markersize=6,
            markeredgewidth=1.5,
        )
        if len(history.attempts) > _MAX_LABELLED_ATTEMPTS:
            continue
        # Right of the line and below it; at the right edge left of it and above.
        is_late = seconds_to_end > _LATE_SHARE * history.wall_seconds
        axes.annotate(
            attempt.end,
            end,
            (-6, 4) if is_late else (2, -14),
            textcoords="offset points",
            ha="right" if is_late else "left",
            fontsize=8,
        )
    axes.margins(y=0.1)
    axes.set_ylabel("step reached")
    axes.grid(axis="y", alpha=0.25)


def _draw_shares(axes: "Axes", history: RunHistory, seconds_per_unit: float) -> None:
    """Draws the shares of time of each column, one activity on top of the other."""
    right = history.wall_seconds / seconds_per_unit
    edges = np.linspace(0, right, NUM_COLUMNS + 1)
    bottom = np.zeros(NUM_COLUMNS)
    for part, shares in zip(PARTS, compute_shares(history), strict=True):
        seconds = history.seconds_by_activity[part]
        if seconds <= 0:
            continue
        top = bottom + shares
        axes.stairs(
            top,
            edges,
            baseline=bottom,
            fill=True,
            color=_COLOURS[part],
            label=f"{part} {seconds / history.wall_seconds:.1%}",
        )
        bottom = top
    axes.set_ylabel("share of time")
    axes.set_ylim(0, 1)
    axes.set_xlim(0, right)


def compute_shares(history: RunHistory) -> np.ndarray:
    """Computes the share of each of ``NUM_COLUMNS`` equal columns of time that each of
    `PARTS` has: [parts, columns]. The parts of a slice are spread evenly over it."""
    begin = history.attempts[0].began
    edges = np.linspace(begin, begin + history.wall_seconds, NUM_COLUMNS + 1)
    # Seconds that each part has had by the end of each slice, [parts, 1 + slices].
    slice_ends = np.array([begin, *(piece.end for piece in history.slices)])
    seconds = np.zeros((len(PARTS), len(slice_ends)))
    for number, piece in enumerate(history.slices, 1):
        for part, spent in piece.seconds_by_activity.items():
            seconds[PARTS.index(part), number] = spent
    cumulative = seconds.cumsum(axis=1)
    # The same by the columns' edges, and what each column adds.
    by_edge = np.stack([np.interp(edges, slice_ends, row) for row in cumulative])
    return np.diff(by_edge) * (NUM_COLUMNS / history.wall_seconds)
