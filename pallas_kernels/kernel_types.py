"""Types that the kernels share: memory as a kernel sees it, and options of a call."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import jax

if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.ref import AbstractRef

    class Ref(AbstractRef):
        """Memory of an operand, a result or scratch space inside a kernel: in VMEM,
        SMEM or HBM of a TPU, in global or shared memory of a GPU. Semaphores and
        barriers are references too.

        Pallas's functions say ``AbstractRef``, which describes such memory and cannot
        be indexed; what a kernel's body gets can.
        """

        def __getitem__(self, index: object) -> jax.Array: ...

        def __setitem__(self, index: object, value: jax.Array | float) -> None: ...

        def __len__(self) -> int: ...

        @property
        def at(self) -> "RefParts":
            """``ref.at[index]`` is a part of the memory, nothing of which is read."""
            ...

        def transpose(self, permutation: tuple[int, ...]) -> "Ref": ...

    class RefParts:
        def __getitem__(self, index: object) -> Ref: ...

else:
    Ref = jax.Ref

Index = int | jax.Array
"""An integer that is known when the kernel is traced, or an int32 scalar of it."""

# A string, because Pallas is slow to import and kernels are imported when they run.
Span: TypeAlias = "slice | pl.Slice"
"""A run along one dimension of memory, as ``pl.ds`` returns it."""

Carry = TypeVar("Carry")
"""What a loop hands from one round to the next, arrays or tuples of them."""

Interpret = bool | Hashable
"""Whether Pallas's interpreter runs a kernel, on any device: True, or the interpreter's
parameters."""
