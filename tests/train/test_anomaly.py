"""When numbers are bad for good, and when they are only noise."""

from statistics import NormalDist

import numpy as np

from maxlm.run.train_config import FaultToleranceConfig
from maxlm.train.anomaly import LossSpikeDetector
from maxlm.train.trainer import RollbackDecision

CONFIG = FaultToleranceConfig(
    max_skipped=3, spike_threshold=10.0, spike_steps=2, spike_window=16
)
NAN = float("nan")


def see(watch, losses, first=1, **values):
    verdicts = []
    for step, loss in enumerate(losses, first):
        skipped = float(np.isnan(loss))
        verdict = watch.update(
            step, {"loss": loss, "skipped": skipped, "param_norm": 1.0, **values}
        )
        verdicts.append(verdict)
    return verdicts


def noise(count, level=2.0, seed=0, width=0.05):
    return (level + width * np.random.default_rng(seed).normal(size=count)).tolist()


def test_updates_left_out_in_a_row_are_bad_and_apart_they_are_not():
    assert (
        see(LossSpikeDetector(CONFIG), [2.0, NAN, NAN, 2.0, NAN, NAN, 2.0])
        == [None] * 7
    )
    assert see(LossSpikeDetector(CONFIG), [2.0, NAN, NAN, NAN])[-1] == RollbackDecision(
        2, 4, "3 updates in a row were not finite"
    )


def test_parameters_that_are_not_finite_are_bad_at_once():
    assert see(LossSpikeDetector(CONFIG), [2.0], first=7, param_norm=NAN) == [
        RollbackDecision(7, 7, "the parameters are not finite")
    ]


def test_a_spike_is_many_deviations_above_the_median_several_times_in_a_row():
    losses = noise(64)
    before = losses[-16:]
    # Of normal numbers, half lie within the third quartile of the median.
    middle = np.median(before)
    deviation = np.median(np.abs(before - middle)) / NormalDist().inv_cdf(0.75)
    limit = middle + 10 * deviation
    assert deviation > 0.005 * middle
    under, over = limit * 0.999, limit * 1.001
    assert see(LossSpikeDetector(CONFIG), [*losses, under, under, under]) == [None] * 67
    assert (
        see(LossSpikeDetector(CONFIG), [*losses, over, 2.0, over, 2.0]) == [None] * 68
    )
    *calm, verdict = see(LossSpikeDetector(CONFIG), [*losses, over, over + 1])
    assert calm == [None] * 65
    assert (verdict.first_bad_step, verdict.last_bad_step) == (65, 66)
    assert verdict.reason == (
        f"the loss is {over + 1:.4f}, above the spike limit of {limit:.4f}"
    )


def test_an_update_left_out_among_spikes_is_in_their_row():
    watch = LossSpikeDetector(CONFIG)
    see(watch, noise(16))
    assert see(watch, [9.0], first=17) == [None]
    assert watch.first_suspect_step(17) == 17
    assert see(watch, [NAN], first=18) == [None]
    assert watch.first_suspect_step(18) == 17
    [verdict] = see(watch, [9.0], first=19)
    assert (verdict.first_bad_step, verdict.last_bad_step) == (17, 19)


def test_a_loss_that_falls_or_is_noise_is_no_spike():
    falling = [
        10 / (1 + n / 20) + x for n, x in enumerate(noise(3000, level=0, width=0.2))
    ]
    watch = LossSpikeDetector(FaultToleranceConfig())
    assert see(watch, falling) == [None] * 3000


def test_a_loss_that_hardly_moves_has_room_in_proportion_to_itself():
    still = [2.0] * 16
    assert (
        see(LossSpikeDetector(CONFIG), [*still, 2.0999, 2.0999]) == [None] * 18
    )  # 10 times 0.5%
    assert see(LossSpikeDetector(CONFIG), [*still, 2.1001, 2.1001])[-1] is not None


def test_without_enough_losses_or_a_threshold_nothing_is_a_spike():
    assert (
        see(LossSpikeDetector(CONFIG), [*noise(15), 99.0, 99.0, 99.0])[:17]
        == [None] * 17
    )
    off = CONFIG.model_copy(update={"spike_threshold": None})
    assert see(LossSpikeDetector(off), [*noise(64), 99.0, 99.0, 99.0]) == [None] * 67


def test_a_run_that_was_started_again_judges_as_one_that_never_stopped():
    losses = [
        *noise(40),
        9.0,
        *noise(10, seed=1),
        NAN,
        NAN,
        2.0,
        NAN,
        *noise(10),
        9.0,
        9.0,
        9.0,
    ]
    whole = see(LossSpikeDetector(CONFIG), losses)
    assert whole.count(None) == len(losses) - 2
    for cut in range(1, len(losses)):
        first = LossSpikeDetector(CONFIG)
        parts = see(first, losses[:cut])
        parts += see(
            LossSpikeDetector(CONFIG, first.state_dict), losses[cut:], first=cut + 1
        )
        assert parts == whole
