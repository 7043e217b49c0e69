"""What a model is trained for.

An objective is a function ``(config, model, batch, key) -> (loss, sums)``: the loss summed over
counted tokens, and sums to log, of which ``tokens`` is the weight everything is divided by. To
add one, write it beside its config and name it in :data:`OBJECTIVES`.
"""

from maxlm.objectives.clm import ClmConfig, clm

ObjectiveConfig = ClmConfig
OBJECTIVES = {"clm": clm}

__all__ = ["OBJECTIVES", "ClmConfig", "ObjectiveConfig", "clm"]
