"""Writes a base's parameters beside an adapter of PEFT's, as the two make one run."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import DTypeLike

from maxlm.adapters.lora import LoraAdapter
from maxlm.huggingface.arrays import Shape
from maxlm.huggingface.checkpoint import ParamWriter
from maxlm.huggingface.families.names import ParamSlice
from maxlm.huggingface.peft.reading import PeftAdapter
from maxlm.models.params import Params, ParamSpec, flatten_names, is_leaf
from maxlm.models.targets import split_dims


@dataclass
class AdaptedParamWriter:
    """Takes the parameters of a published model, and writes those of the adapted one:
    what the adapter's file holds trained in their place, and, with PiSSA, without the
    principal part that A and B begin as."""

    inner: ParamWriter
    peft: PeftAdapter
    specs: Params
    """Declarations of the model without the adapter."""
    _specs: dict[str, ParamSpec] = field(init=False)
    _leaves: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        adapted = flatten_names(self.peft.adapter.adapt(self.specs), is_leaf)
        self._leaves = frozenset(
            name for name, param in adapted.items() if is_leaf(param)
        )
        self._specs = flatten_names(self.specs)

    def declare(
        self,
        name: str,
        shape: Shape,
        num_lead_axes: int = 0,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.inner.declare(self._rename(name), shape, num_lead_axes, dtype)

    def write(self, name: str, lead_index: Shape, values: np.ndarray) -> None:
        place = ParamSlice(name, lead_index)
        values = self.peft.base_values.get(place, values)
        principal_rank = self.peft.principal_ranks.get(place)
        if principal_rank is not None:
            values = self._take_residual(place, values, principal_rank)
        if isinstance(self.peft.adapter, LoraAdapter):
            self._subtract_norms(place, values)
        self.inner.write(self._rename(name), lead_index, values)

    def _take_residual(
        self, place: ParamSlice, values: np.ndarray, rank: int
    ) -> np.ndarray:
        """Returns a kernel without its ``rank`` largest singular values, which PiSSA's
        A and B begin as."""
        matrix = to_matrix(values, self._specs[place.name], len(place.index))
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        residual = (u[:, rank:] * s[rank:]) @ vt[rank:]
        return residual.reshape(values.shape)

    def _subtract_norms(self, place: ParamSlice, values: np.ndarray) -> None:
        """Changes DoRA's magnitudes, if a kernel has some, to what they have beyond the
        norms of the base: the file holds them whole, ``LoraParam`` the difference."""
        magnitudes = self.peft.arrays.get(f"{place.name}.lora_magnitude")
        if magnitudes is None:
            return
        matrix = to_matrix(values, self._specs[place.name], len(place.index))
        norms = np.linalg.norm(matrix, axis=0)
        difference = magnitudes[place.index]  # a view: changed in place
        difference -= norms.reshape(difference.shape)
        difference[np.isnan(difference)] = 0  # of layers that have none

    def finish(self) -> None:
        """Writes the adapter's arrays, when its base is written."""
        for name, array in self.peft.arrays.items():
            self.inner.declare(name, array.shape)
            self.inner.write(name, (), array)

    def _rename(self, name: str) -> str:
        return f"{name}.base" if name in self._leaves else name


def list_trained_names(peft: PeftAdapter, specs: Params) -> tuple[str, ...]:
    """Lists what was trained, as ``train.trainable`` names it in a model with
    declarations ``specs``: the adapter's arrays, and the parameters of the base that
    its file holds; () where there are none of these."""
    if not peft.base_values:
        return ()
    adapted = flatten_names(peft.adapter.adapt(specs), is_leaf)
    base_names: list[str] = []
    for place in peft.base_values:
        is_adapted = is_leaf(adapted[place.name])
        base_names.append(f"{place.name}.base" if is_adapted else place.name)
    # Slices of one parameter name it once.
    return (*peft.arrays, *dict.fromkeys(base_names))


def to_matrix(values: np.ndarray, spec: ParamSpec, num_lead_axes: int) -> np.ndarray:
    """Returns a layer's kernel as [inputs, outputs]."""
    _, output_start = split_dims(spec)
    num_input_dims = output_start - num_lead_axes
    num_inputs = int(np.prod(values.shape[:num_input_dims]))
    return values.reshape(num_inputs, -1)
