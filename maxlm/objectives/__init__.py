"""What a model is trained for.

An objective is a function ``(config, model, batch, key) -> (loss, sums)``: the loss summed over
counted tokens, and sums to log: ``tokens``, the weight everything is divided by, and
``cross_entropy`` in nats, of which bits per byte are made. To add one, write it beside its config,
and join them to ``ObjectiveConfig`` and :data:`OBJECTIVES`.
"""

from maxlm.objectives.clm import ClmConfig, clm

ObjectiveConfig = ClmConfig
OBJECTIVES = {"clm": clm}

__all__ = ["OBJECTIVES", "ClmConfig", "ObjectiveConfig", "clm"]
