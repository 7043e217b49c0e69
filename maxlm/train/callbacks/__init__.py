"""Callbacks of the trainer, one a file: evaluation, checkpoints, loss spikes, stop requests, and
those of the watchdog and the profiler."""

from maxlm.train.callbacks.checkpoints import CheckpointCallback
from maxlm.train.callbacks.evaluation import EvaluationCallback
from maxlm.train.callbacks.loss_spikes import LossSpikeCallback
from maxlm.train.callbacks.stop import StopCallback
from maxlm.train.profile import Profiler
from maxlm.train.watchdog import Watchdog

__all__ = [
    "CheckpointCallback",
    "EvaluationCallback",
    "LossSpikeCallback",
    "Profiler",
    "StopCallback",
    "Watchdog",
]
