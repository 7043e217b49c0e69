"""Progress where there is no terminal: lines with rate and time left."""

import pytest

from maxlm.runtime import progress as module
from maxlm.runtime.progress import show_progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_are_spaced_and_leave_out_what_was_done_before(clock, capsys):
    with show_progress() as progress:
        for seconds, done in [(0, 2e6), (4, 4e6), (10, 7e6), (11, 8e6), (20, 12e6)]:
            clock[0] = 100.0 + seconds
            progress("tokenizing", int(done), 12_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing: 7.0 of 12.0 MB, 0.50 MB/s, 10 s left",
        "tokenizing: 12.0 of 12.0 MB, 0.50 MB/s",
    ]


def test_what_is_not_bytes_is_counted_one_by_one(clock, capsys):
    with show_progress("parts") as progress:
        for seconds, done in [(0, 1000), (6, 1300), (10, 1500)]:
            clock[0] = 100.0 + seconds
            progress("language", done, 1500)
    assert capsys.readouterr().err.splitlines() == [
        "language: 1,300 of 1,500 parts, 50.00 parts/s, 4 s left",
        "language: 1,500 of 1,500 parts, 50.00 parts/s",
    ]
