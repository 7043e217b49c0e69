"""Where a run's time went: against a run that is played out here step by step."""

from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.train.goodput import PARTS, summarize_run_events

pytestmark = pytest.mark.heavy

KINDS = (
    "start",
    "resume",
    "compiled",
    "progress",
    "rollback",
    "hang",
    "evaluate",
    "stop",
    "new",
)
DETAILS = (
    "began",
    "seconds",
    "stepping",
    "loading",
    "generating",
    "saving",
    "evaluating",
    "from_step",
)
EVENTS = st.fixed_dictionaries(
    {
        "event": st.sampled_from(KINDS),
        "step": st.integers(0, 20),
        "time": st.floats(0, 1e4),
    },
    optional=dict.fromkeys(DETAILS, st.floats(0, 1e4)) | {"final": st.booleans()},
)


@settings(max_examples=200)
@given(st.lists(EVENTS, max_size=25), st.floats(0, 2e4))
def test_parts_sum_to_the_whole_whatever_was_written(events, now):
    history = summarize_run_events(events, now)
    assert sum(history.seconds_by_activity.values()) == pytest.approx(
        history.wall_seconds, abs=1e-6
    )
    assert history.seconds_by_activity.keys() == {*PARTS}
    assert min(history.seconds_by_activity.values()) >= 0
    assert history.goodput is None or 0 <= history.goodput <= 1 + 1e-9
    for attempt in history.attempts:
        assert attempt.ended >= attempt.began
        times = [time for time, _ in attempt.points]
        assert times == sorted(times)
    for piece, following in pairwise(history.slices):
        assert piece.end == following.begin


class Play:
    """A run played out: it writes events as maxlm does, and remembers whose work was
    kept."""

    def __init__(self):
        self.clock = 1e9  # Unix seconds
        self.events = []
        self.spent = defaultdict(float)
        """Seconds by part of the time."""
        self.kept = {}
        """By step: the seconds of the update that the run holds, None of one that came
        with compilation."""
        self.stepped = 0.0

    def pass_(self, part, seconds):
        self.clock += seconds
        self.spent[part] += seconds

    def event(self, kind, step, **details):
        self.events.append({"event": kind, "step": step, "time": self.clock, **details})

    def go_back(self, step):
        self.kept = {s: seconds for s, seconds in self.kept.items() if s <= step}

    def attempt(self, draw, step):
        """From ``step`` on; returns the step that the next one begins from, and how it
        ended."""
        number = draw(st.floats(0.1, 30))
        began = self.clock
        self.go_back(step)
        self.pass_("starting", number)
        self.event("resume" if step else "start", step, began=began, devices=8)
        if draw(st.integers(0, 5)) == 0:
            return step, "killed"  # before its first step was done
        seconds = draw(st.floats(0.1, 100))
        self.pass_("compiling", seconds)
        step += 1
        self.kept[step] = 0.0
        self.event("compiled", step, seconds=seconds)
        parts = ("loading", "generating", "saving", "evaluating")
        counted = dict.fromkeys(("stepping", *parts), 0.0)
        saved = 0
        for _ in range(draw(st.integers(0, 12))):
            # Between two events steps take as long as each other: they are told apart
            # pro rata.
            pace = draw(st.floats(0.1, 5))
            for _ in range(draw(st.integers(1, 4))):
                step += 1
                self.clock += pace
                self.stepped += pace
                counted["stepping"] += pace
                self.kept[step] = pace
            for part in parts:
                seconds = draw(st.just(0.0) | st.floats(0.1, 9))
                self.pass_(part, seconds)
                counted[part] += seconds
            self.pass_("other", draw(st.just(0.0) | st.floats(0.1, 2)))
            self.event("progress", step, **counted)
            action = draw(st.sampled_from(["go on", "save", "save", "roll back"]))
            if action == "save":
                self.event("checkpoint", step, tier="folder", seconds=0.0)
                saved = step
            elif action == "roll back" and saved:
                self.event(
                    "rollback", saved, from_step=step, reason="loss", batches=[0, 1]
                )
                step = saved
                self.go_back(step)
                counted = dict.fromkeys(counted, 0.0)
        end = draw(st.sampled_from(["killed", "preempted", "failed", "done", "hang"]))
        if end == "hang":
            seconds = draw(st.floats(1, 100))
            self.pass_("hanging", seconds)
            self.event("hang", step, process=3, seconds=seconds)
        if end == "done" and draw(st.booleans()):
            seconds = draw(st.floats(1, 100))
            self.pass_("evaluating", seconds)
            self.event("evaluate", step, seconds=seconds, final=True)
        if end not in ("killed", "hang"):
            self.event("stop", step, reason=end)
        return (step if end in ("preempted", "done") else saved), end


@settings(max_examples=100)
@given(st.data())
def test_parts_are_those_of_a_run_played_out(data):
    play = Play()
    begins = 0
    ends = []
    for _ in range(data.draw(st.integers(1, 6))):
        if play.events:
            idle = "finished" if ends[-1] == "done" else "down"
            play.pass_(idle, data.draw(st.floats(0.1, 500)))
        begins, end = play.attempt(data.draw, begins)
        ends.append(end)
    history = summarize_run_events(play.events, now_unix_seconds=play.clock + 1000)
    seconds = dict.fromkeys(PARTS, 0.0) | play.spent
    # What was run and never gone back from is all that is kept: the last attempt's is
    # still.
    seconds["productive"] = sum(play.kept.values())
    seconds["lost"] = play.stepped - seconds["productive"]
    assert history.seconds_by_activity == pytest.approx(seconds, abs=1e-4)
    assert history.wall_seconds == pytest.approx(play.clock - 1e9, abs=1e-4)
    assert [attempt.end for attempt in history.attempts] == ends
    interruptions = [end for end in ends if end != "done"]
    assert history.interruptions == Counter(interruptions)
    if interruptions:
        ran = history.wall_seconds - seconds["down"] - seconds["finished"]
        mean = pytest.approx(ran / len(interruptions), abs=1e-4)
        assert history.mean_time_to_interruption == mean
    else:
        assert history.mean_time_to_interruption is None


def log(*events):
    return [
        {"event": kind, "step": step, "time": time, **details}
        for kind, step, time, details in events
    ]


@pytest.mark.parametrize(
    ("silent", "end", "wall"),
    [(59, "running", 69), (61, "killed", 10), (-5, "running", 10)],
)
def test_an_attempt_heard_of_just_now_is_running(silent, end, wall):
    events = log(("start", 0, 0, {"began": 0}), ("progress", 5, 10, {"stepping": 10}))
    history = summarize_run_events(events, now_unix_seconds=10 + silent)
    assert history.attempts[0].end == end
    assert history.wall_seconds == wall
    assert history.interruptions == ({} if end == "running" else {"killed": 1})


def test_a_hang_that_ended_by_itself_is_not_taken_for_steps():
    events = log(
        ("start", 0, 0, {"began": 0}),
        ("hang", 5, 60, {"process": 1, "seconds": 50}),
        ("progress", 6, 70, {"stepping": 70}),
    )
    seconds = summarize_run_events(events, now_unix_seconds=1e6).seconds_by_activity
    assert (seconds["hanging"], seconds["productive"]) == (50, 20)
