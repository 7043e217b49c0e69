"""Summaries of run folders: how far each run is, how it went, where its time was spent;
as data and as tables for a terminal."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

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
# An attempt's row each, at most so many: the first ones of a long history are left out.
ATTEMPTS = 12
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
            del attempt["points"]
        fields = {
            name: value for name, value in vars(self).items() if name != "history"
        }
        return fields | {
            "goodput": history.goodput,
            "wall_seconds": history.wall_seconds,
            "seconds": history.seconds_by_activity,
            "interruptions": history.interruptions,
            "mean_time_to_interruption": history.mean_time_to_interruption,
            "steps_per_second": self.steps_per_second,
            "step_seconds": {str(p): value for p, value in self.step_seconds.items()},
            "attempts": attempts,
            "events": dict(history.event_counts),
        }

    @property
    def steps_per_second(self) -> float | None:
        """Steps that the run holds, over the seconds in which it was not finished."""
        history = self.history
        if not history.goodput:
            return None
        running_seconds = history.wall_seconds - history.seconds_by_activity["finished"]
        return (self.step - history.attempts[0].first_step) / running_seconds


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
    latest = {"loss": None, "eval_loss": None}
    seconds = []
    for record in read_records(folder / "metrics.jsonl", damaged):
        step = max(step, record["step"])
        latest |= {name: record[name] for name in latest if name in record}
        if "final_eval_loss" in record:  # of all held-out text, not of the curve's part
            latest["eval_loss"] = record["final_eval_loss"]
        if record.get("seconds") and record["step"] not in compiling_steps:
            seconds.append(record["seconds"])
    plan = _read_mapping(folder / "plan.json")
    planned = {"step_seconds": ("time", "step"), "goodput": ("goodput", "configured")}
    return RunSummary(
        name=folder.resolve().name,
        state=history.attempts[-1].end if history.attempts else "not begun",
        step=step,
        steps=get_descendant(_read_mapping(folder / "config.yaml"), ("train", "steps")),
        history=history,
        step_seconds={
            p: float(np.percentile(seconds, p)) for p in PERCENTILES if seconds
        },
        planned={name: get_descendant(plan, keys) for name, keys in planned.items()},
        damaged_lines=len(damaged),
        **latest,
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


def _read_mapping(path: Path) -> Any:
    """Reads a YAML or JSON file; None if it cannot be read."""
    try:
        text = path.read_text()
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def show_run_list(runs: Sequence[RunSummary]) -> Group:
    """Makes a table with a row for each run."""
    rows = [
        (
            run.name,
            f"{run.step:,}",
            _or_dash(run.steps, "{:,}".format),
            run.state,
            _or_dash(run.loss, "{:.4f}".format),
            _or_dash(run.history.goodput, "{:.1%}".format),
        )
        for run in runs
    ]
    right = ("step", "of", "loss", "goodput")
    return make_table(
        None, ("run", "step", "of", "state", "loss", "goodput"), rows, right
    )


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
    interruptions = history.interruptions
    if interruptions:
        causes = ", ".join(
            f"{cause} {count}" for cause, count in sorted(interruptions.items())
        )
        number = _count_of(sum(interruptions.values()), "interruption")
        interval = format_duration(history.mean_time_to_interruption or 0)
        parts.append(Text(f"{number} ({causes}), one in {interval} of running"))
    event_words = {"skip": "update skipped", "rollback": "rollback", "hang": "hang"}
    incidents = [
        _count_of(history.event_counts[kind], words)
        for kind, words in event_words.items()
        if history.event_counts.get(kind)
    ]
    if incidents:
        parts.append(Text(" · ".join(incidents)))
    if run.step_seconds:
        parts.append(_show_step_times(run))
    return Group(*parts)


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
    planned = run.planned["goodput"]
    beside = "" if planned is None else f" (planned: {planned:.1%})"
    rate = _or_dash(run.steps_per_second, "{:.3g} steps/s".format)
    return Text.assemble(
        "goodput ",
        (_or_dash(run.history.goodput, "{:.1%}".format), "bold"),
        f"{beside} of {format_duration(run.history.wall_seconds)}, {rate} over all of "
        "it",
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
    for number, attempt in list(enumerate(attempts, 1))[-ATTEMPTS:]:
        began = datetime.fromtimestamp(attempt.began).strftime("%Y-%m-%d %H:%M:%S")
        ran = format_duration(attempt.ended - attempt.began)
        steps = (f"{attempt.first_step:,}", f"{attempt.last_step:,}")
        rows.append((str(number), began, ran, *steps, attempt.end))
    columns = ("", "began", "ran", "from step", "to step", "end")
    table = make_table("Attempts", columns, rows, right=columns[:-1])
    num_left_out = len(attempts) - len(rows)
    if num_left_out:
        return Group(table, Text(f"and {num_left_out:,} before them"))
    return Group(table)


def _show_step_times(run: RunSummary) -> Group:
    columns = (*("max" if p == 100 else f"p{p}" for p in run.step_seconds), "planned")
    planned = _or_dash(run.planned["step_seconds"], format_seconds)
    row = (*map(format_seconds, run.step_seconds.values()), planned)
    return make_table("Time of a step", columns, [row], right=columns)


def _count_of(count: int, phrase: str) -> str:
    """``1 hang``, ``2 hangs``, ``2 updates skipped``."""
    noun, space, rest = phrase.partition(" ")
    plural = "" if count == 1 else "s"
    return f"{count:,} {noun}{plural}{space}{rest}"


def _or_dash(value: Value | None, format_value: Callable[[Value], str]) -> str:
    return "-" if value is None else format_value(value)
