"""Summaries of run folders: how far each run is, how it went, where its time was spent."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maxlm.config import MaxlmError
from maxlm.programs.goodput import RunHistory, summarize_run_events
from maxlm.train.records import read_records

PERCENTILES = (50, 90, 99, 100)


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
    """Seconds of a step by percentile (100: the longest), without the first step of an attempt,
    which compiles; empty for a run without steps."""
    planned_step_seconds: float | None
    planned_goodput: float | None
    damaged_lines: int
    """Lines of metrics.jsonl and events.jsonl that hold no record."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: seconds, unix seconds, shares."""
        told = self.history
        return {
            "name": self.name,
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "goodput": told.goodput,
            "wall_seconds": told.wall_seconds,
            "seconds": told.seconds_by_activity,
            "interruptions": told.interruptions,
            "mean_time_to_interruption": told.mean_time_to_interruption,
            "steps_per_second": self.steps_per_second,
            "step_seconds": {str(p): value for p, value in self.step_seconds.items()},
            "planned": {"step_seconds": self.planned_step_seconds, "goodput": self.planned_goodput},
            "damaged_lines": self.damaged_lines,
            "attempts": [asdict(attempt) for attempt in told.attempts],
            "events": dict(told.event_counts),
        }

    @property
    def steps_per_second(self) -> float | None:
        """Steps that the run holds, over the seconds in which it was not finished."""
        told = self.history
        if not told.goodput:
            return None
        wanted = told.wall_seconds - told.seconds_by_activity["finished"]
        return (self.step - told.attempts[0].first_step) / wanted


def read_run(folder: str | Path, now: float | None = None) -> RunSummary:
    """Reads a run from its folder; nothing in it is changed. An attempt heard of just before
    ``now`` (unix seconds; default: the clock's) may still run."""
    folder = Path(folder)
    if not _is_run(folder):
        what = "is no run's folder" if folder.is_dir() else "no such folder"
        raise MaxlmError(what, where=str(folder), fix="maxlm runs list FOLDER names those there")
    damaged: list[bytes] = []
    events = read_records(folder / "events.jsonl", damaged)
    told = summarize_run_events(events, time.time() if now is None else now)
    first = {attempt.first_step + 1 for attempt in told.attempts}
    step, latest, seconds = 0, {"loss": None, "eval_loss": None}, []
    for record in read_records(folder / "metrics.jsonl", damaged):
        step = max(step, record["step"])
        latest |= {name: record[name] for name in latest if name in record}
        if record.get("seconds") and record["step"] not in first:
            seconds.append(record["seconds"])
    plan = _read_mapping(folder / "plan.json")
    return RunSummary(
        name=folder.resolve().name,
        state=told.attempts[-1].end if told.attempts else "not begun",
        step=step,
        steps=_find_in(_read_mapping(folder / "config.yaml"), "train", "steps"),
        history=told,
        step_seconds={p: float(np.percentile(seconds, p)) for p in PERCENTILES if seconds},
        planned_step_seconds=_find_in(plan, "time", "step"),
        planned_goodput=_find_in(plan, "goodput", "configured"),
        damaged_lines=len(damaged),
        **latest,
    )


def list_runs(folder: str | Path, now: float | None = None) -> list[RunSummary]:
    """Reads the runs that lie in a folder, by name."""
    if not Path(folder).is_dir():
        fix = "name the folder that runs lie in"
        raise MaxlmError("no such folder", where=str(folder), fix=fix)
    return [read_run(path, now) for path in sorted(Path(folder).iterdir()) if _is_run(path)]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("events.jsonl", "config.yaml"))


def _read_mapping(path: Path) -> Any:
    """Reads a YAML or JSON file; None if it cannot be read."""
    try:
        text = path.read_text()
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _find_in(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
