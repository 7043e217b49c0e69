"""Estimates how much of a run's time is progress, with failures, restarts and
checkpoints.

Daly 2006 ("A higher order estimate of the optimum checkpoint interval for restart
dumps", FGCS 22, eq. 20 and 37): with a mean time M between failures, checkpoints of δ
seconds and restarts of R seconds, work of T seconds checkpointed every τ takes
M·exp(R/M)·(exp((τ+δ)/M) − 1)·T/τ.
"""

from dataclasses import dataclass
from math import exp, expm1, sqrt

# Grattafiori et al. 2024 (arXiv 2407.21783), section 3.3.4: 419 unexpected
# interruptions in 54 days on 16,384 GPUs.
DEVICE_MTBF_HOURS = 54 * 24 * 16_384 / 419
# In seconds and in B/s. Two assumptions, for want of figures that hold everywhere: ten minutes to be
# scheduled, start and compile again, and 1 GB/s from a device to storage.
RESTART_SECONDS = 600.0
STORAGE_BYTES_PER_SECOND = 1e9


@dataclass(frozen=True)
class Reliability:
    """How often a machine fails, and what a failure and a checkpoint cost."""

    device_mtbf_hours: float = DEVICE_MTBF_HOURS
    """Mean time between failures of one device that stop the run."""
    restart_seconds: float = RESTART_SECONDS
    """Seconds from a failure to the next step."""
    checkpoint_seconds: float | None = None
    """Seconds that a checkpoint holds up the run; None: as long as its bytes take to
    storage."""


@dataclass(frozen=True)
class Goodput:
    """Shares of time that are progress."""

    mtbf_hours: float
    """Mean time between failures of the whole machine."""
    checkpoint_seconds: float
    restart_seconds: float
    best_interval_seconds: float
    """Daly's optimum; Young's (1974) is its first term, √(2·δ·M)."""
    best: float
    """Share with a checkpoint after every ``best_interval_seconds``."""
    configured_interval_seconds: float
    configured: float
    """Share with the configured interval; 0: it has no checkpoints."""


def estimate_goodput(
    devices: int,
    state_bytes: float,
    step_seconds: float,
    checkpoint_every: int,
    reliability: Reliability = Reliability(),
) -> Goodput:
    """Estimates the share of a run's time that is progress, with a checkpoint of
    ``state_bytes`` a device after ``checkpoint_every`` steps; 0: none."""
    mtbf = reliability.device_mtbf_hours * 3600 / devices
    restart = reliability.restart_seconds
    write = reliability.checkpoint_seconds
    if write is None:
        write = state_bytes / STORAGE_BYTES_PER_SECOND
    best = max(compute_best_interval_seconds(mtbf, write), step_seconds)
    configured = checkpoint_every * step_seconds
    return Goodput(
        mtbf_hours=mtbf / 3600,
        checkpoint_seconds=write,
        restart_seconds=restart,
        best_interval_seconds=best,
        best=compute_goodput_ratio(best, mtbf, write, restart),
        configured_interval_seconds=configured,
        configured=compute_goodput_ratio(configured, mtbf, write, restart),
    )


def compute_best_interval_seconds(mtbf: float, write: float) -> float:
    """Computes Daly's optimum interval (2006, eq. 37); it, the mean time and the write
    are in seconds."""
    if write >= 2 * mtbf:
        return mtbf
    x = write / (2 * mtbf)
    correction = 1 + sqrt(x) / 3 + x / 9
    return max(sqrt(2 * write * mtbf) * correction - write, 1.0)


# exp() overflows soon after; a run of such exponents makes no progress anyway.
_MAX_EXPONENT = 500.0


def compute_goodput_ratio(
    interval: float, mtbf: float, write: float, restart: float
) -> float:
    """Computes the seconds of work done in a second of a run that checkpoints every
    ``interval`` seconds of work (Daly 2006, eq. 20)."""
    exponent = (interval + write) / mtbf
    # There are no checkpoints, or hardly one is ever reached.
    if interval <= 0 or exponent > _MAX_EXPONENT:
        return 0.0
    restart_factor = exp(min(restart / mtbf, _MAX_EXPONENT))
    return interval / (mtbf * restart_factor * expm1(exponent))
