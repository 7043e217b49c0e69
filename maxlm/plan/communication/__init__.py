"""Every collective of a training step, from layouts alone.

All communication of maxlm is written out in programs on shards (``maxlm/parallel``), so that it can
be told without tracing anything: what a map sends follows from how its input, its kernels and its
output lie (the table in ``parallel/linear.py``), and so for attention, experts, the embedding, the
loss, pipelines and the optimizer. Where an axis has one device, a collective has no bytes.
"""

from itertools import chain

import numpy as np

from maxlm.plan.communication.ends import (
    list_end_collectives,
    list_pipeline_collectives,
    list_update_collectives,
)
from maxlm.plan.communication.experts import list_expert_collectives
from maxlm.plan.communication.layers import list_layer_collectives
from maxlm.plan.network import PlannedCollective
from maxlm.plan.shape import StepShape


def list_collectives(shape: StepShape) -> tuple[PlannedCollective, ...]:
    """Every collective of a step that sends more than a few scalars."""
    found = chain(
        list_layer_collectives(shape),
        list_expert_collectives(shape),
        list_end_collectives(shape),
        list_pipeline_collectives(shape),
        list_update_collectives(shape),
    )
    return tuple(c for c in found if c.axes and np.any(np.greater(c.whole_bytes, 0)))
