"""Goodput is what a run that really fails gets done; the best interval is the best."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from maxlm.plan.goodput import best_interval_seconds, estimate_goodput, goodput_ratio


def simulated(
    interval: float, mean: float, write: float, restart: float, hours: float
) -> float:
    """Progress of a run whose failures come at random, interval by interval; a restart
    may fail too."""
    random = np.random.default_rng(0)
    now = 0.0
    done = 0.0
    end = hours * 3600
    failure = random.exponential(mean)
    while now < end:
        if now + interval + write <= failure:
            now, done = now + interval + write, done + interval
            continue
        now = failure
        failure = now + random.exponential(mean)
        while now + restart > failure:
            now = failure
            failure = now + random.exponential(mean)
        now += restart
    return done / now


@pytest.mark.parametrize("times", [(600, 7200, 30, 300), (900, 3600, 60, 900)])
def test_progress_is_what_a_simulated_run_makes(times):
    assert goodput_ratio(*times) == pytest.approx(
        simulated(*times, hours=60_000), rel=0.02
    )


@given(mean=st.floats(1e3, 1e7), share=st.floats(1e-5, 0.2), restart=st.floats(0, 1e3))
def test_the_best_interval_is(mean, share, restart):
    write = share * mean
    found = minimize_scalar(
        lambda tau: -goodput_ratio(tau, mean, write, restart),
        bounds=(write / 100, 5 * mean),
        method="bounded",
        options={"xatol": 1e-4 * write},
    )
    best = goodput_ratio(best_interval_seconds(mean, write), mean, write, restart)
    assert best == pytest.approx(-found.fun, rel=1e-3)


def test_a_larger_machine_fails_more_often():
    few, many = (estimate_goodput(n, 1e9, 36.0, 100) for n in (256, 16_384))
    assert few.mtbf_hours == pytest.approx(64 * many.mtbf_hours)
    # 419 interruptions in 54 days on 16,384 devices: one every three hours.
    assert many.mtbf_hours == pytest.approx(54 * 24 / 419)
    assert many.best < few.best < 1
    assert many.configured <= many.best


def test_the_ends_of_the_scale():
    assert estimate_goodput(64, 1e9, 10.0, 0).configured == 0
    assert goodput_ratio(1e9, 60, 1, 1) == 0
    found = estimate_goodput(64, 0.0, 30.0, 100)
    assert found.best > 0.999
    assert found.best_interval_seconds == 30.0  # no oftener than there are steps
