"""Every collective of a training step, from layouts alone.

All communication of maxlm is written out in programs on shards (``maxlm/parallel``), so that it can
be told without tracing anything: what a map sends follows from how its input, its kernels and its
output lie (the table in ``parallel/linear.py``), and so for attention, experts, the embedding, the
loss, pipelines and the optimizer. Where an axis has one device, a collective has no bytes.
"""

import numpy as np

from maxlm.plan.communication.collective import Collective
from maxlm.plan.communication.ends import ends, pipeline, update
from maxlm.plan.communication.experts import experts
from maxlm.plan.communication.layers import layers
from maxlm.plan.shape import Shape

__all__ = ["Collective", "collectives"]


def collectives(shape: Shape) -> tuple[Collective, ...]:
    """Every collective of a step that sends more than a few scalars."""
    return tuple(
        c
        for part in (layers, experts, ends, pipeline, update)
        for c in part(shape)
        if c.axes and np.any(np.greater(c.whole_bytes, 0))
    )
