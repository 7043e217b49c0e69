"""A process that hangs says where, and ends; one that does not is left alone."""

import time

from maxlm.config.errors import LOST
from maxlm.train.config import FaultsConfig
from maxlm.train.watchdog import Watchdog

QUICK = FaultsConfig(hang_factor=5.0, hang_seconds=0.3, idle_seconds=1.5)


def watch(folder, config=QUICK, process=1):
    ends, events = [], []

    def event(kind, step, **details):
        events.append((kind, step, details))

    return Watchdog(config, folder, process, event, ends.append), ends, events


def wait_for(ends, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not ends and time.monotonic() < deadline:
        time.sleep(0.01)


def a_place_to_hang(ends):
    wait_for(ends)


def test_a_hang_is_told_of_with_every_threads_stack(tmp_path, capfd):
    watchdog, ends, events = watch(tmp_path)
    with watchdog:
        for _ in range(8):
            watchdog.lap(0.02)
        began = time.monotonic()
        watchdog.expect(12)
        a_place_to_hang(ends)
        seconds = time.monotonic() - began
    assert ends == [LOST]
    assert 0.3 <= seconds < 1.4  # the floor, not idle_seconds
    path = tmp_path / "hangs" / "process-1-step-12.txt"
    assert "a_place_to_hang" in path.read_text()
    [(kind, step, details)] = events
    assert (kind, step, details["process"]) == ("hang", 12, 1)
    err = capfd.readouterr().err
    assert "a_place_to_hang" in err
    assert err.splitlines()[-1] == (
        f"error: {tmp_path}: process 1 hangs: step 12 (0.02 s is the median) has taken "
        f"{details['seconds']:.3g} s; what its threads were doing is in {path}; run the same "
        "command to go on from the last checkpoint"
    )


def test_a_step_has_a_multiple_of_the_median_and_what_is_not_a_step_longer(tmp_path):
    slow = QUICK.model_copy(update={"hang_factor": 10.0})
    watchdog, ends, _ = watch(tmp_path, slow)
    with watchdog:
        for seconds in (0.01, 9.0, 0.06, 0.06, 0.06):
            watchdog.lap(seconds)
        watchdog.expect(6)
        time.sleep(0.45)  # more than the floor, less than 10 medians
        assert ends == []
        watchdog.expect(6, "save")
        time.sleep(0.9)
        assert ends == []
        watchdog.expect(6)
        wait_for(ends)
    assert ends == [LOST]


def test_the_first_step_may_compile(tmp_path):
    watchdog, ends, _ = watch(tmp_path)
    with watchdog:
        for _ in range(8):  # after a rollback there have been steps
            watchdog.lap(0.02)
        watchdog.expect(1, "first step")
        time.sleep(0.6)
        assert ends == []


def test_where_no_file_can_be_written_it_says_so(tmp_path, capfd):
    (tmp_path / "hangs").write_text("")
    watchdog, ends, _ = watch(tmp_path)
    with watchdog:
        watchdog.expect(3, "save")
        wait_for(ends)
    assert ends == [LOST]
    assert "process-1-step-3.txt cannot be written: " in capfd.readouterr().err
