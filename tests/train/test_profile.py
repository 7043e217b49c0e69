"""A trace of the steps that were asked for, read back with JAX's own reader."""

from contextlib import suppress

import jax
import jax.numpy as jnp
import pytest

from maxlm.config import MaxlmError
from maxlm.train.profile import Profiler, parse_steps


@pytest.mark.parametrize(
    ("text", "steps"), [("10:13", (10, 13)), ("10", (10, 10)), ("1:1", (1, 1))]
)
def test_steps(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "a", "0", "13:10", "10:", ":5", "1:2:3", "-1:4", "1.5"])
def test_what_names_no_steps(text):
    with pytest.raises(MaxlmError) as error:
        parse_steps(text)
    assert str(error.value) == (
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
    profiler.on_train_end(None, 0, x)


def traces(folder):
    """For each file, the steps it names and how often the program ran."""
    for path in sorted(folder.rglob("*.xplane.pb")):
        events = [
            event
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            for line in plane.lines
            for event in line.events
        ]
        steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
        # Python's own call of the program is listed beside each run of it.
        yield sorted(steps), sum(event.name.startswith("wrapped_sine") for event in events)


def test_a_trace_has_these_steps_and_no_others(tmp_path):
    loop(Profiler(tmp_path, 3, 5), range(1, 9))
    assert list(traces(tmp_path / "profile")) == [([3, 4, 5], 3)]


def test_a_run_that_ends_or_begins_between_them(tmp_path):
    loop(Profiler(tmp_path / "ends", 3, 50), range(1, 5))
    loop(Profiler(tmp_path / "begins", 3, 5), range(5, 9))
    assert list(traces(tmp_path / "ends")) == [([3, 4], 2)]
    assert list(traces(tmp_path / "begins")) == [([5], 1)]


def test_none_is_taken_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop(Profiler(tmp_path, 10, 12), range(1, 4))
    loop(Profiler(tmp_path, 10, 12), range(13, 15))
    assert not list(tmp_path.iterdir())


def test_a_second_trace_or_no_place_for_it_is_an_error(tmp_path):
    first = Profiler(tmp_path, 1, 9)
    first.on_step_begin(None, 1, None)
    with pytest.raises(MaxlmError, match="profile: no trace: "):
        Profiler(tmp_path / "second", 1, 9).on_step_begin(None, 1, None)
    first.on_step_dispatched(None, 1, None)
    first.on_exception(None, RuntimeError())
    (tmp_path / "third").mkdir()
    in_the_way = tmp_path / "third" / "profile"
    in_the_way.write_text("a file")
    with pytest.raises(MaxlmError, match=r"third.profile: no trace: "):
        loop(Profiler(tmp_path / "third", 1, 2), range(1, 4))
    in_the_way.unlink()
    with suppress(RuntimeError):  # JAX keeps a trace open that it could not write.
        jax.profiler.stop_trace()
