"""A trace of the steps that were asked for, read back with JAX's own reader."""

import shutil
from contextlib import suppress

import jax
import jax.numpy as jnp
import pytest

from maxlm.config import MaxlmError
from maxlm.train.profile import Profiler, parse_steps
from tests.errors import message


def test_steps_are_one_or_the_first_and_last():
    assert [parse_steps(text) for text in ("10:13", "10")] == [(10, 13), (10, 10)]
    for text in ("", "0", "13:10", "10:", ":5", "1:2:3", "1.5"):
        assert message(parse_steps, text) == (
            f"--profile: '{text}' names no steps; write the first and last: 10:13"
        )


def loop(profiler, steps):
    """As training does: the next step is handed over before the last one is done."""

    @jax.jit
    def traced_step(x):
        return jnp.sin(x @ x)

    x = jnp.ones((256, 256))
    for step in steps:
        profiler.on_step_begin(None, step, x)
        x = traced_step(x)
        profiler.on_step_dispatched(None, step, x)
    profiler.on_stop(None)


def traces(folder):
    """For each file, the steps it names and how often the program ran."""
    for path in sorted(folder.rglob("*.xplane.pb")):
        events = [
            event
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            for line in plane.lines
            for event in line.events
        ]
        steps = [
            dict(event.stats)["step_num"] for event in events if event.name == "train"
        ]
        # Python's own call of the program is listed beside each run of it.
        sines = [
            event for event in events if event.name.startswith(("wrapped_sine", "sin."))
        ]
        yield sorted(steps), len(sines)


@pytest.mark.parametrize(
    ("first", "last", "steps", "traced"),
    [
        (3, 5, range(1, 9), [3, 4, 5]),
        (3, 50, range(1, 5), [3, 4]),
        (3, 5, range(5, 9), [5]),
        (10, 12, range(1, 4), []),
        (10, 12, range(13, 15), []),
    ],
)
def test_trace_has_the_steps_asked_for_that_the_run_takes(
    tmp_path, first, last, steps, traced
):
    loop(Profiler(tmp_path, first, last), steps)
    want = [(traced, len(traced))] if traced else []
    assert list(traces(tmp_path)) == want


def test_a_second_trace_or_no_place_for_it_is_an_error(tmp_path):
    first = Profiler(tmp_path, 1, 9)
    first.on_step_begin(None, 1, None)
    with pytest.raises(MaxlmError, match="profile: no trace: "):
        Profiler(tmp_path / "second", 1, 9).on_step_begin(None, 1, None)
    first.on_step_dispatched(None, 1, None)
    first.on_stop(None)
    in_the_way = tmp_path / "profile"
    shutil.rmtree(in_the_way)
    in_the_way.write_text("a file")
    with pytest.raises(MaxlmError, match=r"profile: no trace: "):
        loop(Profiler(tmp_path, 1, 2), range(1, 4))
    in_the_way.unlink()
    with suppress(RuntimeError):  # JAX keeps a trace open that it could not write.
        jax.profiler.stop_trace()
