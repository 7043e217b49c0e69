"""Runs as tables for a terminal."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from maxlm.plan.show import make_table, make_untitled_table
from maxlm.programs.goodput import PARTS
from maxlm.programs.runs import RunSummary
from maxlm.train.display import format_duration

# An attempt's row each, at most so many: the first ones of a long history are left out.
ATTEMPTS = 12


def show_run_list(runs: Sequence[RunSummary]) -> Table:
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
    return make_untitled_table(("run", "step", "of", "state", "loss", "goodput"), rows, right)


def show_run(run: RunSummary, now: float) -> Group:
    """Shows a run's progress at ``now`` (unix seconds), where its time went, its attempts and
    interruptions, its steps."""
    told = run.history
    parts: list[Any] = [_headline(run, now)]
    if run.damaged_lines:
        words = "line of metrics.jsonl and events.jsonl cannot be read"
        parts.append(Text(_many(run.damaged_lines, words)))
    if not told.attempts:
        return Group(*parts)
    parts += [_goodput(run), _time(run), _attempts(run)]
    ends = told.interruptions
    if ends:
        causes = ", ".join(f"{cause} {count}" for cause, count in sorted(ends.items()))
        parts.append(
            Text(
                f"{_many(sum(ends.values()), 'interruption')} ({causes}), "
                f"one in {format_duration(told.mean_time_to_interruption or 0)} of running"
            )
        )
    if happened := [
        _many(told.event_counts[kind], word)
        for kind, word in (("skip", "update skipped"), ("rollback", "rollback"), ("hang", "hang"))
        if told.event_counts.get(kind)
    ]:
        parts.append(Text(" · ".join(happened)))
    if run.step_seconds:
        parts.append(_steps(run))
    return Group(*parts)


def _headline(run: RunSummary, now: float) -> Text:
    words = [f"step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")]
    words += [f"loss {run.loss:.4f}"] if run.loss is not None else []
    words += [f"held out {run.eval_loss:.4f}"] if run.eval_loss is not None else []
    state = run.state
    if run.history.attempts:
        last = run.history.attempts[-1]
        words += [_many(last.devices, "device")] if last.devices else []
        if state == "killed":  # or in a step that takes minutes: nothing else can tell
            state = f"killed, or silent: last heard of {format_duration(now - last.ended)} ago"
    return Text.assemble((run.name, "bold"), f" · {state} · {' · '.join(words)}")


def _goodput(run: RunSummary) -> Text:
    share = _or_dash(run.history.goodput, "{:.1%}".format)
    planned = run.planned_goodput
    beside = "" if planned is None else f" (planned: {planned:.1%})"
    rate = _or_dash(run.steps_per_second, "{:.3g} steps/s".format)
    return Text.assemble(
        "goodput ",
        (share, "bold"),
        f"{beside} of {format_duration(run.history.wall_seconds)}, {rate} over all of it",
    )


def _time(run: RunSummary) -> Group:
    seconds, wall = run.history.seconds_by_activity, run.history.wall_seconds
    rows = [
        (part, format_duration(seconds[part]), f"{seconds[part] / wall:.1%}")
        for part in PARTS
        if seconds[part] > 0
    ]
    sizes = ("time", "share")
    return make_table("Where the time went", ("spent", *sizes), rows, sizes)


def _attempts(run: RunSummary) -> Group:
    attempts, rows = run.history.attempts, []
    for number, attempt in list(enumerate(attempts, 1))[-ATTEMPTS:]:
        began = datetime.fromtimestamp(attempt.began).strftime("%Y-%m-%d %H:%M:%S")
        ran = format_duration(attempt.ended - attempt.began)
        steps = (f"{attempt.first_step:,}", f"{attempt.last_step:,}")
        rows.append((str(number), began, ran, *steps, attempt.end))
    columns = ("", "began", "ran", "from step", "to step", "end")
    table = make_table("Attempts", columns, rows, right=columns[:-1])
    left_out = len(attempts) - len(rows)
    return Group(table, *([Text(f"and {left_out:,} before them")] if left_out else []))


def _steps(run: RunSummary) -> Group:
    columns = (*("max" if p == 100 else f"p{p}" for p in run.step_seconds), "planned")
    planned = _or_dash(run.planned_step_seconds, _step_words)
    row = (*map(_step_words, run.step_seconds.values()), planned)
    return make_table("Time of a step", columns, [row], right=columns)


def _step_words(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.4g} s"


def _many(count: int, what: str) -> str:
    """``1 hang``, ``2 hangs``, ``2 updates skipped``."""
    noun, _, rest = what.partition(" ")
    return f"{count:,} {noun}{'' if count == 1 else 's'}{f' {rest}' if rest else ''}"


def _or_dash(value: Any, words: Callable[[Any], str]) -> str:
    return "-" if value is None else words(value)
