"""Cross-entropy of a linear head, whose logits [T, V] never exist at once.

:func:`linear_cross_entropy` is differentiable. :func:`loss_and_gradients` is one device's part of
it, for a caller that splits the tokens or the vocabulary over devices.
"""

from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy, loss_and_gradients
from pallas_kernels.linear_cross_entropy.blocks import CrossEntropyBlocks, CrossEntropyTiling
from pallas_kernels.linear_cross_entropy.parts import CrossEntropyGradients

__all__ = [
    "CrossEntropyBlocks",
    "CrossEntropyGradients",
    "CrossEntropyTiling",
    "linear_cross_entropy",
    "loss_and_gradients",
]
