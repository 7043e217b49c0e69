"""Progress of a run: a live line on a terminal, plain lines elsewhere, and a plot at
the end."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from maxlm.config import MaxlmError
from maxlm.runtime.files import replace_file
from maxlm.runtime.json_types import JsonMapping
from maxlm.train.records import read_records

_SECONDS_BETWEEN_LINES = 10.0
_BAR_WIDTH = 14
# Metrics of a task that have a line of their own; the rates stand in a second.
_MAX_SHOWN_OF_A_LINE = 4
_SHOWN_OF_EVERY_RUN = {
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "loader_wait": "loader wait {:.1%}",
}


def format_duration(seconds: float) -> str:
    """Formats ``75`` as ``1:15``, ``3723`` as ``1:02:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _break_line(parts: Sequence[str], width: int, num_lines: int) -> str:
    """Joins parts by dots, in as many lines of ``width`` as they need, ``num_lines`` at
    most; the last has the rest, however long."""
    lines = [parts[0]]
    for part in parts[1:]:
        joined = f"{lines[-1]} · {part}"
        if len(joined) > width and len(lines) < num_lines:
            lines.append(part)
        else:
            lines[-1] = joined
    return "\n".join(lines)


class ConsoleDisplay:
    """Progress of a run on stderr. A context manager.

    On a terminal, a bar that stays in place: step, time left, what ``shown`` names,
    learning rate, tokens/s, MFU, loader wait and steps/s, in two lines where a task
    shows much. Elsewhere one line at most every 10 seconds, with the same content. Time left and steps/s are measured from the end of the first
    step shown, which compiles; evaluations and checkpoints after it count.

    Args:
        start_step: steps made before this start (a resumed run).
        show: False on all processes but the first: every method then does nothing.
        shown: how each metric is written that is shown, where a record has it.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        show: bool = True,
        shown: Mapping[str, str],
    ):
        self.total_steps = total_steps
        # The task's own words come before those of every run.
        self._shown = dict(shown)
        for name, template in _SHOWN_OF_EVERY_RUN.items():
            self._shown.setdefault(name, template)
        self._show = show
        # The first step shown, and when it was.
        self._first: tuple[int, float] | None = None
        self._printed = float("-inf")
        self._progress = None
        self._num_lines = 2 if len(shown) > _MAX_SHOWN_OF_A_LINE else 1
        self._text_width = 0
        if show and sys.stderr.isatty():
            # A narrow terminal loses the end of the text, never the step.
            counts = Column(
                no_wrap=True, min_width=len(f"step {total_steps}/{total_steps}")
            )
            text = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            console = Console(stderr=True)
            # Beside the step, the bar and a space behind each.
            self._text_width = console.width - (counts.min_width or 0) - _BAR_WIDTH - 2
            self._progress = Progress(
                TextColumn(
                    "step {task.completed:.0f}/{task.total:.0f}", table_column=counts
                ),
                BarColumn(bar_width=_BAR_WIDTH),
                TextColumn("{task.fields[text]}", table_column=text),
                console=console,
                expand=True,
            )
            self._task = self._progress.add_task(
                "", total=total_steps, completed=start_step, text=""
            )

    def update(self, step: int, record: JsonMapping) -> None:
        """Shows that ``step`` steps are done, with the main numbers of a metrics
        record."""
        if not self._show:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        num_steps = step - first_step
        seconds = now - first_time
        time_left = "-"
        if num_steps > 0:
            seconds_left = (self.total_steps - step) * seconds / num_steps
            time_left = format_duration(seconds_left)
        parts = [f"ETA {time_left}"]
        for name, template in self._shown.items():
            if record.get(name) is not None:
                parts.append(template.format(record[name]))
        if num_steps > 0:
            parts.append(f"{num_steps / max(seconds, 1e-9):.2f} steps/s")
        text = " · ".join(parts)
        if self._progress:
            text = _break_line(parts, self._text_width, self._num_lines)
            self._progress.update(self._task, completed=step, text=text)
        elif now - self._printed >= _SECONDS_BETWEEN_LINES or step >= self.total_steps:
            self._printed = now
            print(
                f"step {step}/{self.total_steps} · {text}", file=sys.stderr, flush=True
            )

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self._show:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "ConsoleDisplay":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()


def plot_metrics(
    metrics: str | Path, image: str | Path, names: Mapping[str, str]
) -> None:
    """Draws metrics of a ``metrics.jsonl`` over ``tokens`` as a PNG, each that there is
    in a panel of its own: what training measures twice, faintly each step and boldly
    their means over 1% of the steps, and what is held out (``eval_`` and the name).
    Points of a held-out curve are all of the same rows; what the end measures on all
    held-out text, where that is more, is a mark beside it. The x axis of losses is
    logarithmic, so that the early fall and the late crawl can both be read.

    Args:
        names: what each metric is called.

    Raises:
        MaxlmError: none of them is there.
    """
    records = list(read_records(Path(metrics)))
    tokens = {
        record["step"]: record["tokens"] for record in records if "tokens" in record
    }

    def select_points(name: str) -> np.ndarray:
        """Returns [2, points]: tokens and values."""
        points = []
        for record in records:
            x = tokens.get(record["step"])
            value = record.get(name)
            if x is not None and value is not None:
                points.append((x, value))
        return np.array(points, float).reshape(-1, 2).T

    panels = {}
    for name in names:
        training_points = select_points(name)
        eval_points = select_points(f"eval_{name}")
        if training_points.size or eval_points.size:
            panels[name] = (training_points, eval_points)
    if not panels:
        message = f"no {' and no '.join(names)} to plot"
        fix = "train for a few steps first"
        raise MaxlmError(message, where=str(metrics), fix=fix)

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_columns = min(len(panels), 2)
    num_rows = -(-len(panels) // num_columns)
    size = (8 * num_columns, 4.5 * num_rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = FigureCanvasAgg(figure).figure.subplots(num_rows, num_columns, squeeze=False)
    all_axes = grid.ravel().tolist()
    for unused_axes in all_axes[len(panels) :]:
        unused_axes.set_visible(False)
    for axes, (name, ((x, values), (x_eval, eval_values))) in zip(
        all_axes, panels.items(), strict=False
    ):
        if values.size:
            # A moving mean over 1% of the steps; at the ends, over those there are.
            window = np.ones(2 * (values.size // 200) + 1)
            sums = np.convolve(values, window, "same")
            counts = np.convolve(np.ones_like(x), window, "same")
            means = sums / counts
            axes.plot(x, values, color="#4C78A8", linewidth=0.8, alpha=0.3)
            axes.plot(x, means, color="#4C78A8", linewidth=1.5, label="training")
        if eval_values.size:
            axes.plot(
                x_eval,
                eval_values,
                color="#E45756",
                linewidth=1.5,
                marker="o",
                markersize=4,
                label="held out",
            )
            axes.annotate(
                f"{eval_values[-1]:.3f}",
                (x_eval[-1], eval_values[-1]),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=9,
            )
        final = select_points(f"final_eval_{name}")[:, -1:]
        last_of_curve = np.stack([x_eval, eval_values])[:, -1:]
        # The same where the curve is measured on all held-out text too.
        if final.size and not np.array_equal(final, last_of_curve):
            axes.plot(
                *final,
                color="#72231F",
                label=f"all held-out text: {final[1, 0]:.3f}",
                marker="*",
                markersize=9,
                linestyle="none",
            )
        axes.set_xscale("log" if name == "loss" else "linear")
        axes.set_xlabel("tokens seen")
        axes.set_ylabel(names[name])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False)
    with replace_file(Path(image)) as temporary:
        figure.savefig(temporary, format="png")
