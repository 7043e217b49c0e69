"""A process that hangs says where, and ends; one that does not is left alone."""

import threading
import time
from types import SimpleNamespace

import pytest

from maxlm.config.errors import LOST
from maxlm.run.train_config import FaultToleranceConfig
from maxlm.train.watchdog import Watchdog

QUICK = FaultToleranceConfig(hang_factor=5.0, hang_seconds=0.3, idle_seconds=1.5)


def watch(folder, config=QUICK, process=1):
    ends, events = [], []

    def event(kind, step, **details):
        events.append((kind, step, details))

    watchdog = Watchdog(config, folder, process)
    watchdog.event = event
    watchdog.exit_process = ends.append
    return watchdog, ends, events


def take(watchdog, seconds):
    """A step that took so long."""
    watchdog.on_step_end(None, 1, {"seconds": seconds})


def wait_for(ends, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not ends and time.monotonic() < deadline:
        time.sleep(0.01)


def a_place_to_hang(ends):
    wait_for(ends)


def test_a_hang_is_told_of_with_every_threads_stack(tmp_path, capfd):
    watchdog, ends, events = watch(
        tmp_path, QUICK.model_copy(update={"idle_seconds": 300.0})
    )
    with watchdog:
        for _ in range(8):
            take(watchdog, 0.02)
        began = time.monotonic()
        watchdog.start_timer(12)
        a_place_to_hang(ends)
        seconds = time.monotonic() - began
    assert ends == [LOST]
    assert 0.3 <= seconds < 300  # the floor, not idle_seconds
    path = tmp_path / "hangs" / "process-1-step-12.txt"
    assert "a_place_to_hang" in path.read_text()
    [(kind, step, details)] = events
    assert (kind, step, details["process"]) == ("hang", 12, 1)
    err = capfd.readouterr().err
    assert "a_place_to_hang" in err
    assert err.splitlines()[-1] == (
        f"error: {tmp_path}: process 1 hangs: step 12 (0.02 s is the median) has taken "
        f"{details['seconds']:.3g} s; what its threads were doing is in {path}; run "
        f"the same "
        "command to resume from the last checkpoint"
    )


def limit_seconds(watchdog, work):
    watchdog.start_timer(1, work)
    return watchdog.awaited.timeout_seconds


def test_step_has_a_multiple_of_the_median_and_other_work_has_longer(tmp_path):
    watchdog, _, _ = watch(tmp_path)
    for seconds in (0.01, 9.0, 0.08, 0.08):
        take(watchdog, seconds)
    assert limit_seconds(watchdog, "step") == 1.5  # four steps say little
    take(watchdog, 0.08)
    assert limit_seconds(watchdog, "step") == pytest.approx(5 * 0.08)
    assert {limit_seconds(watchdog, work) for work in ("first step", "save")} == {1.5}
    for _ in range(5):
        take(watchdog, 0.02)
    assert (
        limit_seconds(watchdog, "step") == 0.3
    )  # five medians of 0.02 s are below the floor
    for _ in range(100):
        take(watchdog, 1.0)
    assert limit_seconds(watchdog, "step") == 5.0


def test_work_done_in_time_ends_nothing(tmp_path, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("maxlm.train.watchdog.time", clock)
    watchdog, ends, events = watch(tmp_path)
    watchdog.start_timer(1, "save")
    now[0] += 1.4
    watchdog.reset_timer()
    assert watchdog.awaited.start_seconds == now[0]
    watchdog.stop_timer()
    now[0] += 100.0
    with watchdog:
        pass
    assert (ends, events) == ([], [])


@pytest.mark.heavy
def test_what_comes_before_the_process_is_ended_spares_it(tmp_path, capfd):
    watchdog, ends, _ = watch(tmp_path, QUICK.model_copy(update={"idle_seconds": 0.3}))
    steps = []
    last = threading.Event()

    def event(kind, step, **_):
        steps.append(step)
        if step < 5:
            watchdog.start_timer(step + 1, "save")
        else:
            watchdog.stop_timer()
            last.set()

    watchdog.event = event
    with watchdog:
        watchdog.start_timer(3, "save")
        assert last.wait(60)
    assert (steps, ends) == ([3, 4, 5], [])
    err = capfd.readouterr().err.splitlines()
    for step in (3, 4):
        assert (
            f"{tmp_path}: process 1: save {step} is done after all, training continues"
            in err
        )


def test_a_telling_that_never_ends_hides_no_later_hang(tmp_path, monkeypatch):
    """The disk that it is written to hangs too."""
    monkeypatch.setattr("maxlm.train.watchdog._REPORT_SECONDS", 0.2)
    watchdog, ends, _ = watch(tmp_path, QUICK.model_copy(update={"idle_seconds": 0.3}))
    reporting, never = threading.Event(), threading.Event()

    def event(*_, **__):
        if not reporting.is_set():
            watchdog.start_timer(4, "save")
            reporting.set()
            never.wait(60)

    watchdog.event = event
    with watchdog:
        watchdog.start_timer(3, "save")
        assert reporting.wait(60)
        wait_for(ends)
    never.set()
    assert ends == [LOST]
