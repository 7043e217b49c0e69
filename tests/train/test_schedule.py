"""Schedules against their closed forms in float64."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.train.optimizer import ScheduleConfig, make_schedule
from tests.errors import message

PEAK, FINAL, WARMUP, TOTAL = 3e-3, 0.07, 13, 101


def expected(kind: str, step: int, decay_steps: int = 30) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / (TOTAL - WARMUP)
    if kind == "constant":
        return PEAK
    if kind == "cosine":
        return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)
    if kind == "wsd":
        done = max(0.0, (step - (TOTAL - decay_steps)) / decay_steps)
    return PEAK * (1 - done * (1 - FINAL))


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_every_step_equals_the_closed_form(kind):
    config = ScheduleConfig(
        kind=kind,
        learning_rate=PEAK,
        warmup_steps=WARMUP,
        final_fraction=FINAL,
        decay_fraction=0.3,  # 30.3 steps, rounded to 30
    )
    steps = np.arange(TOTAL + 1)
    got = jax.vmap(make_schedule(config, TOTAL))(steps)
    np.testing.assert_allclose(got, [expected(kind, int(s)) for s in steps], rtol=3e-6)
    at_once = make_schedule(config.model_copy(update={"warmup_steps": 0}), TOTAL)
    assert float(at_once(0)) == pytest.approx(PEAK)
    assert float(at_once(TOTAL)) == pytest.approx(PEAK * (1 if kind == "constant" else FINAL))


@given(
    kind=st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    total=st.integers(1, 300),
    share=st.floats(0, 1),
    decay=st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_rates_stay_positive_and_at_most_the_peak(kind, total, share, decay):
    warmup = round(share * total)
    config = ScheduleConfig(
        kind=kind, learning_rate=PEAK, warmup_steps=warmup, decay_fraction=decay * (1 - share)
    )
    try:
        schedule = make_schedule(config, total)
    except MaxlmError:  # rounding can make the parts one step too long
        assert kind == "wsd"
        return
    for step in {0, min(warmup, total - 1), total // 2, total - 1}:
        assert 0 < float(schedule(step)) <= PEAK * (1 + 1e-6)


def test_warmup_or_decay_longer_than_the_run_is_refused():
    assert message(make_schedule, ScheduleConfig(warmup_steps=200), 100) == (
        "schedule: warmup_steps=200 is longer than the run of 100 steps; "
        "set warmup_steps to 100 or less, or train for longer"
    )
    config = ScheduleConfig(kind="wsd", warmup_steps=60, decay_fraction=0.5)
    assert message(make_schedule, config, 100) == (
        "schedule: warmup_steps=60 and a decay of 50 steps are longer than the run of 100 steps; "
        "lower warmup_steps or decay_fraction"
    )
