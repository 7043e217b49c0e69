"""Summaries of run folders: how far each run is, how it went, where its time was spent;
as data and as tables for a terminal."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml
from rich.console import Group, RenderableType
from rich.text import Text

from maxlm.config import MaxlmError
from maxlm.config.keys import get_descendant
from maxlm.plan.show import format_seconds, make_table
from maxlm.runtime.json_types import JsonObject
from maxlm.train.display import format_duration
from maxlm.train.goodput import PARTS, RunHistory, summarize_run_events
from maxlm.train.records import read_events, read_records

PERCENTILES = (50, 90, 99, 100)
MAX_ATTEMPTS_SHOWN = 12
"""Rows of the table of attempts; the first ones of a long history are left out."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class RunSummary:
    """A run as its folder describes it; None: unknown."""

    name: str
    state: str
    """``running``, ``done``, or what ended its last attempt; ``not begun``."""
    step: int
    steps: int | None
    """Steps of the whole run."""
    loss: float | None
    eval_loss: float | None
    history: RunHistory
    step_seconds: dict[int, float]
    """Seconds of a step by percentile (100: the longest), without the first step of an
    attempt, which compiles; empty for a run without steps."""
    planned: dict[str, float | None]
    """``step_seconds`` and ``goodput``, by the plan."""
    damaged_lines: int
    """Lines of metrics.jsonl and events.jsonl that hold no record."""

    def to_json(self) -> JsonObject:
        """Returns plain data: seconds, unix seconds, shares."""
        history = self.history
        attempts = [asdict(attempt) for attempt in history.attempts]
        for attempt in attempts:
            del attempt["points"]  # for images alone, and many
        step_seconds = {
            str(percentile): seconds
            for percentile, seconds in self.step_seconds.items()
        }
        return {
            "name": self.name,
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "step_seconds": step_seconds,
            "planned": self.planned,
            "damaged_lines": self.damaged_lines,
            "goodput": history.goodput,
            "wall_seconds": history.wall_seconds,
            "seconds": history.seconds_by_activity,
            "interruptions": history.interruptions,
            "mean_time_to_interruption": history.mean_time_to_interruption,
            "steps_per_second": self.steps_per_second,
            "attempts": attempts,
            "events": dict(history.event_counts),
        }

    @property
    def steps_per_second(self) -> float | None:
        """Steps that the run holds, over the seconds in which it was not finished."""
        history = self.history
        if not history.goodput:
            return None
        num_steps = self.step - history.attempts[0].first_step
        running_seconds = history.wall_seconds - history.seconds_by_activity["finished"]
        return num_steps / running_seconds


def read_run(folder: str | Path, now: float | None = None) -> RunSummary:
    """Reads a run from its folder; nothing in it is changed. An attempt heard of just
    before ``now`` (unix seconds; default: the clock's) may still run."""
    folder = Path(folder)
    if not _is_run(folder):
        message = "is no run's folder" if folder.is_dir() else "no such folder"
        raise MaxlmError(
            message, where=str(folder), fix="maxlm runs list FOLDER names those there"
        )
    damaged: list[bytes] = []
    events = read_events(folder / "events.jsonl", damaged)
    history = summarize_run_events(events, time.time() if now is None else now)
    # The first step of an attempt compiles.
    compiling_steps = {attempt.first_step + 1 for attempt in history.attempts}
    step = 0
    loss = None
    eval_loss = None
    seconds = []
    for record in read_records(folder / "metrics.jsonl", damaged):
        step = max(step, record["step"])
        loss = record.get("loss", loss)
        eval_loss = record.get("eval_loss", eval_loss)
        # The last is of all held-out text, not of the part that curves are made of.
        eval_loss = record.get("final_eval_loss", eval_loss)
        if record.get("seconds") and record["step"] not in compiling_steps:
            seconds.append(record["seconds"])
    step_seconds: dict[int, float] = {}
    if seconds:
        for percentile in PERCENTILES:
            step_seconds[percentile] = float(np.percentile(seconds, percentile))

    config = _read_data_file(folder / "config.yaml")
    plan = _read_data_file(folder / "plan.json")
    planned = {
        "step_seconds": get_descendant(plan, ("time", "step")),
        "goodput": get_descendant(plan, ("goodput", "configured")),
    }
    return RunSummary(
        name=folder.resolve().name,
        state=history.attempts[-1].end if history.attempts else "not begun",
        step=step,
        steps=get_descendant(config, ("train", "steps")),
        loss=loss,
        eval_loss=eval_loss,
        history=history,
        step_seconds=step_seconds,
        planned=planned,
        damaged_lines=len(damaged),
    )


def list_runs(folder: str | Path, now: float | None = None) -> list[RunSummary]:
    """Reads the runs that lie in a folder, by name."""
    if not Path(folder).is_dir():
        fix = "name the folder that runs lie in"
        raise MaxlmError("no such folder", where=str(folder), fix=fix)
    return [
        read_run(path, now) for path in sorted(Path(folder).iterdir()) if _is_run(path)
    ]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("events.jsonl", "config.yaml"))


def _read_data_file(path: Path) -> object:
    """Reads a YAML or JSON file; None if it cannot be read."""
    try:
        text = path.read_text()
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def show_run_list(runs: Sequence[RunSummary]) -> Group:
    """Makes a table with a row for each run."""
    columns = ("run", "step", "of", "state", "loss", "goodput")
    rows = []
    for run in runs:
        steps = _or_dash(run.steps, "{:,}".format)
        loss = _or_dash(run.loss, "{:.4f}".format)
        goodput = _or_dash(run.history.goodput, "{:.1%}".format)
        rows.append((run.name, f"{run.step:,}", steps, run.state, loss, goodput))
    return make_table(None, columns, rows, right=("step", "of", "loss", "goodput"))


def show_run(run: RunSummary, now: float) -> Group:
    """Shows a run's progress at ``now`` (unix seconds), where its time went, its
    attempts and interruptions, its steps."""
    history = run.history
    parts: list[RenderableType] = [_show_headline(run, now)]
    if run.damaged_lines:
        words = "line of metrics.jsonl and events.jsonl cannot be read"
        parts.append(Text(_count_of(run.damaged_lines, words)))
    if not history.attempts:
        return Group(*parts)
    parts += [_show_goodput(run), _show_time(run), _show_attempts(run)]
    if history.interruptions:
        parts.append(_show_interruptions(history))
    event_phrases = {"skip": "update skipped", "rollback": "rollback", "hang": "hang"}
    incidents = []
    for kind, phrase in event_phrases.items():
        count = history.event_counts.get(kind)
        if count:
            incidents.append(_count_of(count, phrase))
    if incidents:
        parts.append(Text(" · ".join(incidents)))
    if run.step_seconds:
        parts.append(_show_step_times(run))
    return Group(*parts)


def _show_interruptions(history: RunHistory) -> Text:
    interruptions = history.interruptions
    causes = [f"{cause} {count}" for cause, count in sorted(interruptions.items())]
    total = _count_of(sum(interruptions.values()), "interruption")
    interval = format_duration(history.mean_time_to_interruption or 0)
    return Text(f"{total} ({', '.join(causes)}), one in {interval} of running")


def _show_headline(run: RunSummary, now: float) -> Text:
    step = f"step {run.step:,}"
    if run.steps:
        step += f" of {run.steps:,}"
    parts = [step]
    if run.loss is not None:
        parts.append(f"loss {run.loss:.4f}")
    if run.eval_loss is not None:
        parts.append(f"held out {run.eval_loss:.4f}")
    state = run.state
    if run.history.attempts:
        last_attempt = run.history.attempts[-1]
        if last_attempt.devices:
            parts.append(_count_of(last_attempt.devices, "device"))
        if state == "killed":  # or in a step that takes minutes: nothing else can tell
            silence = format_duration(now - last_attempt.ended)
            state = f"killed, or silent: last heard of {silence} ago"
    return Text.assemble((run.name, "bold"), f" · {state} · {' · '.join(parts)}")


def _show_goodput(run: RunSummary) -> Text:
    goodput = _or_dash(run.history.goodput, "{:.1%}".format)
    planned = run.planned["goodput"]
    planned_note = "" if planned is None else f" (planned: {planned:.1%})"
    wall_time = format_duration(run.history.wall_seconds)
    rate = _or_dash(run.steps_per_second, "{:.3g} steps/s".format)
    return Text.assemble(
        "goodput ",
        (goodput, "bold"),
        f"{planned_note} of {wall_time}, {rate} over all of it",
    )


def _show_time(run: RunSummary) -> Group:
    rows = []
    for part in PARTS:
        seconds = run.history.seconds_by_activity[part]
        if seconds > 0:
            share = seconds / run.history.wall_seconds
            rows.append((part, format_duration(seconds), f"{share:.1%}"))
    columns = ("spent", "time", "share")
    return make_table("Where the time went", columns, rows, right=columns[1:])


def _show_attempts(run: RunSummary) -> Group:
    attempts = run.history.attempts
    rows = []
    numbered = list(enumerate(attempts, 1))
    for number, attempt in numbered[-MAX_ATTEMPTS_SHOWN:]:
        row = (
            str(number),
            datetime.fromtimestamp(attempt.began).strftime("%Y-%m-%d %H:%M:%S"),
            format_duration(attempt.ended - attempt.began),
            f"{attempt.first_step:,}",
            f"{attempt.last_step:,}",
            attempt.end,
        )
        rows.append(row)
    columns = ("", "began", "ran", "from step", "to step", "end")
    table = make_table("Attempts", columns, rows, right=columns[:-1])
    num_left_out = len(attempts) - len(rows)
    if num_left_out:
        return Group(table, Text(f"and {num_left_out:,} before them"))
    return Group(table)


def _show_step_times(run: RunSummary) -> Group:
    columns = []
    row = []
    for percentile, seconds in run.step_seconds.items():
        columns.append("max" if percentile == 100 else f"p{percentile}")
        row.append(format_seconds(seconds))
    columns.append("planned")
    row.append(_or_dash(run.planned["step_seconds"], format_seconds))
    return make_table("Time of a step", columns, [row], right=columns)


def _count_of(count: int, phrase: str) -> str:
    """Returns ``1 hang``, ``2 hangs``, ``2 updates skipped``: the plural is that of the
    phrase's first word."""
    noun, space, rest = phrase.partition(" ")
    plural = "" if count == 1 else "s"
    return f"{count:,} {noun}{plural}{space}{rest}"


def _or_dash(value: Value | None, format_value: Callable[[Value], str]) -> str:
    return "-" if value is None else format_value(value)
