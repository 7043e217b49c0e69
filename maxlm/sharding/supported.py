"""Mesh axes that code registered from outside must know of: on them it sees a batch in
another form."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.errors import Requirement
from maxlm.sharding.rules import AxisRules

ReshapingAxis = Literal["context", "stage"]
"""``context``: rows are split over devices, and their tokens stand in another order
unless ``parallel.balance_sequence`` is false. ``stage``: layers lie on pipeline stages,
and a batch's micro-batches [M, B, ...] run together."""


def require_declared_axes(
    declared: Collection[ReshapingAxis],
    compute: AxisRules,
    sizes: Mapping[str, Any],
    subject: str,
    how_to_declare: str,
) -> Iterator[Requirement]:
    """Requires that code declares the axes of a mesh that reshape what it sees.

    Args:
        compute: rules of arrays in use: ``seq`` names the mesh axes that split rows.
        sizes: devices by mesh axis, or arrays of them.
        subject: for the message, such as ``task.kind=dpo``.
        how_to_declare: for the message, with ``{}`` for the axis to declare.
    """

    def refuse(axis: str, declaration: str, meaning: str) -> MaxlmError:
        what = f"{axis}={sizes[axis]} {meaning}, and {subject} does not say that it supports this"
        fix = f"set it to 1, or if it does, {how_to_declare.format(declaration)}"
        return MaxlmError(what, where=f"mesh.{axis}", fix=fix)

    if "context" not in declared:
        for axis in compute.seq:
            meaning = "splits rows and reorders their tokens"
            refuse_context = partial(refuse, axis, "context", meaning)
            yield Requirement(np.equal(sizes[axis], 1), refuse_context)
    if "stage" not in declared:
        meaning = "runs all micro-batches [M, B, ...] together through a pipeline"
        refuse_stage = partial(refuse, "stage", "stage", meaning)
        yield Requirement(np.equal(sizes["stage"], 1), refuse_stage)
