"""Progress of a run: a live line on a terminal, plain lines elsewhere, and a plot at the end."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from maxlm.config import MaxlmError
from maxlm.train.records import read_records


def format_duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``3723`` as ``1:02:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def summarize_record(record: Mapping[str, Any]) -> str:
    """The parts of a metrics record that one watches, on one line; what is missing is left out."""
    parts = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "loader_wait": "loader wait {:.1%}",
    }
    return " · ".join(
        form.format(record[name]) for name, form in parts.items() if record.get(name) is not None
    )


class ConsoleDisplay:
    """Progress of a run on stderr. A context manager.

    On a terminal, a bar that stays in place: step, time left, loss, learning rate, tokens/s, MFU,
    loader wait and steps/s. Elsewhere one line at most every ``every_seconds``, with the same
    content. Time left and steps/s are measured from the end of the first step shown, which
    compiles; evaluations and checkpoints after it count.

    Args:
        total_steps: of the whole run.
        start_step: steps made before this start (a resumed run).
        show: False on all processes but the first: every method then does nothing.
        stream: where to print (default: stderr).
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        show: bool = True,
        every_seconds: float = 10.0,
        stream: TextIO | None = None,
    ):
        self.total_steps = total_steps
        self._show, self._every = show, every_seconds
        self._stream = stream or sys.stderr
        self._first: tuple[int, float] | None = None  # the first step shown, when it was
        self._printed = float("-inf")
        self._progress = None
        if show and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            # A narrow terminal loses the end of the text, never the step.
            counts = Column(no_wrap=True, min_width=len(f"step {total_steps}/{total_steps}"))
            text = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=counts),
                BarColumn(bar_width=14),
                TextColumn("{task.fields[text]}", table_column=text),
                console=Console(file=self._stream),
                expand=True,
            )
            self._task = self._progress.add_task(
                "", total=total_steps, completed=start_step, text=""
            )

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Show that ``step`` steps are done. ``record``: see :func:`summary`."""
        if not self._show:
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        steps, seconds = step - self._first[0], now - self._first[1]
        left, speed = "ETA -", ""
        if steps > 0:
            left = f"ETA {format_duration((self.total_steps - step) * seconds / steps)}"
            speed = f"{steps / max(seconds, 1e-9):.2f} steps/s"
        text = " · ".join(filter(None, [left, summarize_record(record), speed]))
        if self._progress:
            self._progress.update(self._task, completed=step, text=text)
        elif now - self._printed >= self._every or step >= self.total_steps:
            self._printed = now
            print(f"step {step}/{self.total_steps} · {text}", file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self._show:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> "ConsoleDisplay":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Means over a centred window of 1% of the values, shorter at both ends."""
    half = len(values) // 200
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def plot_loss(metrics: str | Path, image: str | Path) -> None:
    """Draw the ``loss`` and ``eval_loss`` of a ``metrics.jsonl`` as a PNG.

    Training losses are drawn twice, faintly each and boldly their means over 1% of the steps. The
    x axis is ``tokens`` where every step has them (in any of its records), else steps; it is
    logarithmic, so that the early fall and the late crawl can both be read.

    Raises:
        MaxlmError: the file is missing, or holds no loss.
    """
    records = list(read_records(Path(metrics)))
    train = [r for r in records if r.get("loss") is not None]
    held_out = [r for r in records if r.get("eval_loss") is not None]
    if not train and not held_out:
        raise MaxlmError("no losses to plot", where=str(metrics), fix="train for a few steps first")
    tokens = {r["step"]: r["tokens"] for r in records if "tokens" in r}
    counted = all(r["step"] in tokens for r in train + held_out)

    def where(record: Mapping[str, Any]) -> int:
        return tokens[record["step"]] if counted else record["step"]

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    if train:
        x, y = [where(r) for r in train], [r["loss"] for r in train]
        axes.plot(x, y, color="#4C78A8", linewidth=0.8, alpha=0.3)
        axes.plot(x, _smooth(y), color="#4C78A8", linewidth=1.5, label="training")
    if held_out:
        x, y = [where(r) for r in held_out], [r["eval_loss"] for r in held_out]
        axes.plot(x, y, color="#E45756", linewidth=1.5, marker="o", markersize=4, label="held out")
        axes.annotate(
            f"{y[-1]:.3f}", (x[-1], y[-1]), xytext=(5, 5), textcoords="offset points", fontsize=9
        )
    axes.set_xscale("log")
    axes.set_xlabel("tokens seen" if counted else "step")
    axes.set_ylabel("loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)

    image = Path(image)
    temporary = image.with_name(f".{image.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(image)
