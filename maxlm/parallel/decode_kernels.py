"""Kernels that a step of decoding computes with in place of XLA's own programs.

The engine stands above the models, which cannot import its kernels; so it hands them
down. Its :class:`DecodeKernels` are part of the spec that its steps are compiled for
(:class:`~maxlm.inference.step.EngineSpec`): a step sets ``multiply`` as the product of
the model's linear maps, and ``attention`` travels in the
:class:`~maxlm.models.caches.RaggedBatch` that caches attend with. A training step has
neither.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
from jax.typing import DTypeLike

from pallas_kernels.paged_attention import PagedKernel, PagedOperands, PagedParams

__all__ = [
    "DecodeKernels",
    "LocalProduct",
    "PagedKernel",
    "PagedOperands",
    "PagedParams",
]


class LocalProduct(Protocol):
    """``x · kernel`` on one device's shards, without gradient."""

    def __call__(
        self,
        x: jax.Array,
        kernel: jax.Array,
        num_inputs: int,
        dtype: DTypeLike | None = None,
        *,
        column_major: bool = False,
    ) -> jax.Array:
        """Multiplies x [..., *inputs] by a kernel [*inputs, *outputs].

        Args:
            num_inputs: how many dimensions of the kernel are inputs.
            dtype: of the result; None: as of the operands.
            column_major: whether the kernel is the transpose of an array, and so lies
                in memory with its inputs side by side.

        Returns:
            [..., *outputs].
        """
        ...


@dataclass(frozen=True)
class DecodeKernels:
    """A step's product of linear maps, and its attention to pages."""

    multiply: LocalProduct
    attention: PagedKernel
