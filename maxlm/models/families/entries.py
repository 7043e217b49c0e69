"""How a family's tensors lie in our parameters: one table, read in both directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class ParamSlice(NamedTuple):
    """A parameter, or the part of it that belongs to one layer (and one expert)."""

    name: str
    """Canonical, as in "layers.attention.query.kernel"."""
    index: tuple[int, ...] = ()
    """Leading indices: the layer, and maybe the expert; none for all of the parameter."""


def wrap_tensor(tensor: np.ndarray) -> Sequence[np.ndarray]:
    """Returns the tensor is one of our parameters just as it is."""
    return (tensor,)


def unwrap_tensor(tensors: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of :func:`wrap_tensor`."""
    (tensor,) = tensors
    return tensor


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of theirs and where it lies in ours.

    ``split`` and ``join`` are pure, see fp32, and may return views of what they were given.
    """

    theirs: str
    """Its full name in the safetensors files."""
    shape: tuple[int, ...]
    """There."""
    ours: tuple[ParamSlice, ...]
    split: Callable[[np.ndarray], Sequence[np.ndarray]] = wrap_tensor
    """Theirs → an array for each place, in the shape of the parameter at its index."""
    join: Callable[[Sequence[np.ndarray]], np.ndarray] = unwrap_tensor
    """The inverse."""
    aliases: tuple[str, ...] = ()
    """Names under which the same tensor may be stored again (tied heads)."""
