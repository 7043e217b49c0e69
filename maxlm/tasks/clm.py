"""Causal language modelling: predict the next token of the same document."""

from typing import Literal

from maxlm.tasks.loss import LossConfig


class ClmConfig(LossConfig):
    """Every token from those before it."""

    kind: Literal["clm"] = "clm"
