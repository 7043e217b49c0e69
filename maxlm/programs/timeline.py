"""A run's history drawn over time: the steps reached, and what the time was spent on."""

from pathlib import Path

import numpy as np

from maxlm.config import MaxlmError
from maxlm.programs.goodput import PARTS, History
from maxlm.runtime.files import convert_write_errors, replace_file

# Good time is one calm colour, lost steps and downtime are loud.
COLOURS = {
    "productive": "#59A14F",
    "lost": "#E15759",
    "starting": "#BAB0AC",
    "compiling": "#76B7B2",
    "loading": "#F28E2B",
    "saving": "#4E79A7",
    "evaluating": "#B07AA1",
    "hanging": "#9C2F2F",
    "other": "#D7D3CF",
    "down": "#3B3B3B",
    "finished": "#FFFFFF",
}
UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
# Columns of the lower part: one is about two points wide.
COLUMNS = 240


def draw_history(told: History, image: Path, *, title: str = "") -> None:
    """Draw a history as a PNG: above, the steps reached, with a mark at each interruption; below,
    column by column, the shares of time. Its folder is made if missing."""
    if told.wall <= 0:
        raise MaxlmError("no time to plot", where=title or None, fix="wait for the run to begin")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Two of the unit at least: fewer would be read as fractions.
    scale, unit = next(((s, u) for s, u in UNITS if told.wall >= 2 * s), UNITS[-1])
    zero = told.spans[0].begin
    figure = Figure(figsize=(10, 5.5), dpi=150, layout="constrained")
    above, below = FigureCanvasAgg(figure).figure.subplots(
        2, sharex=True, gridspec_kw={"height_ratios": [3, 1.4]}
    )
    for attempt in told.attempts:
        times, steps = (np.array(attempt.points).T - [[zero], [0]]) / [[scale], [1]]
        above.plot(times, steps, color=COLOURS["productive"], linewidth=2)
        if attempt.end not in ("done", "running"):
            at = ((attempt.ended - zero) / scale, attempt.last_step)
            style = {"color": COLOURS["down"], "markersize": 6, "markeredgewidth": 1.5}
            above.plot(*at, marker="x", clip_on=False, **style)
            if len(told.attempts) <= 12:  # below the line; at the right edge above it
                late = at[0] > 0.85 * told.wall / scale
                where, side = ((-6, 4), "right") if late else ((2, -14), "left")
                above.annotate(
                    attempt.end, at, where, textcoords="offset points", ha=side, fontsize=8
                )
    above.margins(y=0.1)
    above.set_ylabel("step reached")
    above.grid(axis="y", alpha=0.25)
    share = "" if told.goodput is None else f"goodput {told.goodput:.1%}"
    above.set_title(" · ".join(filter(None, [title, share])), loc="left", fontsize=11)

    shares = _compute_shares(told)
    edges = np.linspace(0, told.wall / scale, COLUMNS + 1)
    bottom = np.zeros(COLUMNS)
    seconds = told.seconds
    for part, share in zip(PARTS, shares, strict=True):
        if seconds[part] > 0:
            label = f"{part} {seconds[part] / told.wall:.1%}"
            below.stairs(
                bottom + share, edges, baseline=bottom, fill=True, color=COLOURS[part], label=label
            )
            bottom = bottom + share
    below.set_ylabel("share of time")
    below.set_xlabel(f"{unit} since the run began")
    below.set_ylim(0, 1)
    below.set_xlim(0, told.wall / scale)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    with convert_write_errors(image.parent):
        image.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(image) as temporary:
        figure.savefig(temporary, format="png")


def _compute_shares(told: History) -> np.ndarray:
    """[parts, columns]: the share of each column's time that each part has."""
    spans, begin = told.spans, told.spans[0].begin
    edges = np.linspace(begin, begin + told.wall, COLUMNS + 1)
    ends = np.array([begin, *(span.end for span in spans)])
    seconds = np.zeros((len(PARTS), len(ends)))
    for number, span in enumerate(spans, 1):
        seconds[PARTS.index(span.part), number] = span.end - span.begin
    passed = [np.interp(edges, ends, row) for row in seconds.cumsum(axis=1)]
    return np.diff(passed) * (COLUMNS / told.wall)
