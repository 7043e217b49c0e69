"""Schedules of the learning rate: a warm-up, then a shape."""

from typing import Literal

import optax
from pydantic import Field

from maxlm.config import Config, MaxlmError


class ScheduleConfig(Config):
    """The learning rate as a function of the step."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """constant: the peak to the end. cosine, linear: down to the final rate over the
    whole run, so the run's length must be known before it starts. wsd (warm-up, stable,
    decay): the peak, then down linearly over the last `decay_fraction` of the run; its
    stable part can be extended, or decayed more than once, without starting over."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The peak."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps before the first one at the peak; the rate rises linearly, never from
    exactly zero."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the run that wsd spends decaying; the other kinds ignore it."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Rate at the end of the run / peak; constant ignores it."""


def make_schedule(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
    """Makes the learning rate's schedule of 0-based steps: ``schedule(step) -> float32
    scalar``.

    With peak p, warm-up w and total t: ``p (s + 1) / (w + 1)`` for ``s < w``; ``p`` at
    ``s = w``; ``p · final_fraction`` at ``s = t`` (one past the last step, so that no
    step is spent at zero). Raises MaxlmError: the warm-up, or the warm-up and the
    decay, are longer than the run."""
    peak = config.learning_rate
    warmup = config.warmup_steps
    final = config.final_fraction
    if warmup > total_steps:
        message = f"warmup_steps={warmup} is longer than the run of {total_steps} steps"
        fix = f"set warmup_steps to {total_steps} or less, or train for longer"
        raise MaxlmError(message, where="schedule", fix=fix)
    rest = total_steps - warmup
    if config.kind == "constant":
        shape = optax.constant_schedule(peak)
    elif config.kind == "cosine":
        shape = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=final)
    elif config.kind == "linear":
        shape = optax.linear_schedule(peak, peak * final, max(rest, 1))
    else:
        decay = max(round(config.decay_fraction * total_steps), 1)
        if decay > max(rest, 1):
            message = (
                f"warmup_steps={warmup} and a decay of {decay} steps are longer than "
                f"the run of {total_steps} steps"
            )
            fix = "lower warmup_steps or decay_fraction"
            raise MaxlmError(message, where="schedule", fix=fix)
        start = rest - decay
        shape = optax.linear_schedule(peak, peak * final, decay, transition_begin=start)
    if warmup == 0:
        return shape
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, shape], [warmup])
