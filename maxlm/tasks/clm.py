"""Causal language modelling: predict the next token of the same document."""

from typing import ClassVar, Literal

from maxlm.tasks.text import TextTask


class ClmTask(TextTask):
    """Every token from those before it."""

    predicts_every_token: ClassVar[bool] = True

    kind: Literal["clm"] = "clm"
