"""Metrics: the numbers, the files a killed and resumed run leaves, what is shown and
drawn."""

import errno
import io
import json
import os
import re
import resource
import struct
import sys
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.rl.tasks.grpo import GrpoTask
from maxlm.run.reporting_config import ReportingConfig
from maxlm.tasks import ClmTask
from maxlm.train import display
from maxlm.train.display import ConsoleDisplay, plot_metrics
from maxlm.train.records import MetricsLog, read_records
from maxlm.train.runs import read_run
from maxlm.train.trainer import measure_peak_memory_bytes

QUIET = ReportingConfig(tensorboard=False)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_memory_is_labelled_by_what_was_measured():
    record = measure_peak_memory_bytes()
    assert list(record) == ["process_memory_peak"]  # the CPU backend counts nothing
    assert 50e6 < record["process_memory_peak"] < 1e12


def run(folder, steps, resume_step=0, reporting=ReportingConfig(), write=True):
    with MetricsLog(folder, resume_step, write=write, reporting=reporting) as log:
        log.event("resume" if resume_step else "start", resume_step)
        for step in steps:
            log.log(step, {"loss": jnp.float32(1 / step), "tokens": 8 * step})


def test_file_of_an_interrupted_or_rolled_back_run_equals_an_unbroken_ones(tmp_path):
    run(tmp_path / "whole", range(1, 8), reporting=QUIET)
    run(tmp_path / "broken", range(1, 6), reporting=QUIET)
    with (tmp_path / "broken/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    assert [r["step"] for r in read_records(tmp_path / "broken/metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]
    with MetricsLog(tmp_path / "broken", 4, reporting=QUIET) as log:
        log.event("resume", 4)
        log.log(5, {"loss": 99.0})
        log.rewind(3)
        for step in range(4, 8):
            log.log(step, {"loss": jnp.float32(1 / step), "tokens": 8 * step})
    whole, broken = (tmp_path / name / "metrics.jsonl" for name in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()
    assert lines(whole)[2] == {"step": 3, "loss": pytest.approx(1 / 3), "tokens": 24}
    events = lines(tmp_path / "broken" / "events.jsonl")
    assert [(e["event"], e["step"]) for e in events] == [("start", 0), ("resume", 4)]
    assert events[0]["time"] <= events[1]["time"]
    run(tmp_path / "whole", [1], reporting=QUIET)  # a new run
    assert [r["step"] for r in lines(whole)] == [1]


def test_damaged_records_stay_and_are_counted(tmp_path):
    run(tmp_path, range(1, 8), reporting=QUIET)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    bad = [
        whole[1].replace(b'"step"', b'"stdp"'),
        whole[3].replace(b":", b";"),
        whole[6][:-2] + b"\n",
    ]
    path.write_bytes(
        b"".join([whole[0], bad[0], whole[2], bad[1], *whole[4:6], bad[2], b'{"st'])
    )
    (tmp_path / "events.jsonl").open("a").write("\0\n")
    read = read_run(tmp_path)
    assert (read.damaged_lines, read.step) == (4, 6)
    with MetricsLog(tmp_path, 5, reporting=QUIET) as log:
        assert log.damaged_lines == 2  # the third is of a step that is taken again
    assert path.read_bytes() == b"".join([whole[0], bad[0], whole[2], bad[1], whole[4]])


def test_nothing_is_written_to_a_folder_that_is_gone(tmp_path):
    """The files are open, and would take what nobody finds again."""
    words = ": this folder, or a file of the run's in it, was deleted or moved during the run; "
    folder = tmp_path / "run"
    with MetricsLog(folder, reporting=QUIET) as log:
        log.log(1, {"loss": 2.0})
        (folder / "metrics.jsonl").rename(tmp_path / "aside")
        with pytest.raises(MaxlmError, match=f"^{folder}{words}"):
            log.log(2, {"loss": 2.0})
        folder.rename(tmp_path / "moved")
        with pytest.raises(MaxlmError, match=f"^{folder}{words}"):
            log.event("checkpoint", 2)
    assert not folder.exists()


def test_numbers_that_json_lacks_are_null(tmp_path):
    with MetricsLog(tmp_path, reporting=QUIET) as log:
        log.log(1, {"loss": float("nan"), "norm": -float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "norm": null}\n'


@contextmanager
def files_at_most(size):
    """The kernel takes so many bytes a file, and part of a write that goes past, as a
    full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_no_room_for_a_record_is_an_error_and_leaves_no_half_of_it(tmp_path, name):
    path = tmp_path / name
    with MetricsLog(tmp_path, reporting=QUIET) as log:
        write = (
            log.log
            if name == "metrics.jsonl"
            else lambda step, values: log.event("x", step)
        )
        write(1, {"loss": 1.0})
        first_record = path.read_bytes()
        with files_at_most(len(first_record) + 10), pytest.raises(MaxlmError) as error:
            write(2, {"loss": 2.0})
        assert path.read_bytes() == first_record
    assert str(error.value) == (
        f"{path}: cannot write: {os.strerror(errno.EFBIG)}; "
        "free some disk space, or check the folder and its permissions"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


RECORD = {
    "loss": 2.5,
    "learning_rate": 3e-4,
    "tokens_per_second": 12345.6,
    "mfu": 0.421,
    "loader_wait": 0.0012,
}
SHOWN = "loss 2.5000 · lr 3.00e-04 · 12,346 tokens/s · MFU 42.1% · loader wait 0.1%"


def test_plain_lines_come_seldom_and_have_no_eta_before_a_steady_step(monkeypatch):
    """An hour of compilation counts for nothing; an evaluation within the steady steps
    does."""
    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with ConsoleDisplay(107, start_step=97, shown=ClmTask.shown_metrics) as console:
        for step, seconds in {
            98: 3600,
            99: 3602,
            100: 3604,
            101: 3614,
            107: 3616,
        }.items():
            clock[0] = seconds
            console.update(
                step, RECORD if step < 107 else {"loss": 2.5, "mfu": None, "other": 1}
            )
    assert stream.getvalue().splitlines() == [
        f"step 98/107 · ETA - · {SHOWN}",
        f"step 101/107 · ETA 0:28 · {SHOWN} · 0.21 steps/s",  # 3 steps in 14 s
        "step 107/107 · ETA 0:00 · loss 2.5000 · 0.56 steps/s",
    ]


def test_the_line_of_a_policy_begins_with_its_reward(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with ConsoleDisplay(9, shown=GrpoTask.shown_metrics) as console:
        console.update(1, {"reward": 0.125, "entropy": 0.5, "clip_share": 0.011})
    line = "step 1/9 · ETA - · reward 0.125 · entropy 0.50 · clip 1.1%\n"
    assert stream.getvalue() == line


@pytest.mark.parametrize("columns", [60, 80, 118])
def test_a_narrow_terminal_still_shows_step_and_time_left(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with ConsoleDisplay(123_456, shown=ClmTask.shown_metrics) as console:
        console.update(1, RECORD)
        console.message("a [bold] note")
        console.update(98_765, RECORD)
    assert "\x1b[" in stream.getvalue()
    shown = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(r"step 98765/123456 +\S+ ETA 0:0\d · loss \d", shown)
    assert "a [bold] note" in shown


def test_a_policy_has_two_lines_and_all_of_it_in_100_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    record = {
        **RECORD,
        "reward": 0.51249,
        "response_length": 1234.4,
        "kl": 0.0123,
        "entropy": 1.234,
        "clip_share": 0.012,
        "engine_difference": 1.4e-5,
        "generated_tokens_per_second": 38_600.4,
    }
    with ConsoleDisplay(1_000, shown=GrpoTask.shown_metrics) as console:
        console.update(1, record)
        console.update(2, record)
    shown = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", stream.getvalue())
    lines = [line.rstrip() for line in shown.splitlines()]
    first = "reward 0.512 · length 1234 · KL 0.012 · entropy 1.23"
    second = "clip 1.2% · engine ±1e-05 · draws 38,600/s · trains 12,346 tokens/s"
    assert any(line.endswith(first) and "step 2/1000" in line for line in lines)
    assert any(line.lstrip().startswith(second) for line in lines)
    assert max(map(len, lines)) <= 100


def test_other_processes_write_and_show_nothing(tmp_path, monkeypatch):
    run(tmp_path / "none", [1, 2], write=False)
    assert not (tmp_path / "none").exists()
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with ConsoleDisplay(20, show=False, shown={}) as console:
        console.update(20, RECORD)
        console.message("hello")
    assert stream.getvalue() == ""


def test_losses_are_drawn_over_tokens_with_means_over_one_in_a_hundred_steps(
    tmp_path, monkeypatch
):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: (drawn.append(a), plot(self, *a, **k))
    )
    losses = np.random.default_rng(0).normal(size=407).tolist()
    with MetricsLog(tmp_path, reporting=QUIET) as log:
        for step, loss in enumerate(losses, 1):
            log.log(step, {"loss": loss, "tokens": 512 * step})
        log.log(400, {"eval_loss": 2.0})
    plot_metrics(
        tmp_path / "metrics.jsonl", tmp_path / "loss.png", ClmTask.plotted_metrics
    )
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (1200, 675)
    means = [np.mean(losses[max(i - 2, 0) : i + 3]) for i in range(407)]
    (tokens, raw), (_, smooth), held_out = drawn
    np.testing.assert_array_equal(tokens, 512 * np.arange(1, 408))
    np.testing.assert_array_equal(raw, losses)
    np.testing.assert_allclose(smooth, means, rtol=1e-9, atol=1e-12)
    assert [array.tolist() for array in held_out] == [[512 * 400], [2.0]]


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "loss": null}\n'])
def test_nothing_to_plot_is_an_error(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MaxlmError) as error:
        plot_metrics(path, tmp_path / "loss.png", ClmTask.plotted_metrics)
    assert (
        str(error.value)
        == f"{path}: no loss and no accuracy to plot; train for a few steps first"
    )
    assert not (tmp_path / "loss.png").exists()
