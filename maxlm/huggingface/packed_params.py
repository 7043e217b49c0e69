"""Quantized parameters of checkpoints, written from dense slices and read as such."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.huggingface.arrays import Shape
from maxlm.huggingface.checkpoint import (
    CheckpointReader,
    ParamWriter,
    ReadSlice,
)
from maxlm.models.params import Params, flatten_names, get_base, is_leaf
from maxlm.quantization.leaf import MatrixForm, QuantizedParam


def list_matrix_forms(specs: Params) -> dict[str, MatrixForm]:
    """Returns what the arrays of all quantized parameters mean, by the parameters'
    canonical names, or those of the bases of adapted ones."""
    forms: dict[str, MatrixForm] = {}
    for name, stored in flatten_names(specs, is_leaf).items():
        base = get_base(stored)
        if not isinstance(base, QuantizedParam):
            continue
        is_adapted = base is not stored
        forms[f"{name}.{stored.base_field}" if is_adapted else name] = base.form
    return forms


class QuantizingWriter:
    """Rounds the slices of quantized parameters to their formats, and hands all on. One
    slice is in memory beside its codes."""

    def __init__(self, writer: ParamWriter, forms: Mapping[str, MatrixForm]):
        self._writer = writer
        self._forms = forms
        self._encoders = {
            form: jax.jit(form.encode) for form in dict.fromkeys(forms.values())
        }

    def declare(
        self,
        name: str,
        shape: Shape,
        num_lead_axes: int = 0,
        dtype: DTypeLike = np.float32,
    ) -> None:
        """Announces a parameter as a model without quantization has it."""
        form = self._forms.get(name)
        if form is None:
            self._writer.declare(name, shape, num_lead_axes, dtype)
            return
        assert num_lead_axes <= form.num_lead_dims, name
        for plane, spec in form.declare_planes().items():
            self._writer.declare(
                f"{name}.{plane}", spec.shape, num_lead_axes, spec.dtype
            )

    def write(self, name: str, lead_index: Shape, values: np.ndarray) -> None:
        """Writes the slice of a parameter at some leading indices. Raises MaxlmError: a
        matrix with values that are NaN or infinite."""
        form = self._forms.get(name)
        if form is None:
            self._writer.write(name, lead_index, values)
            return
        if not np.isfinite(values).all():
            message = "values are NaN or infinite, which no number format rounds"
            fix = (
                "use an undamaged model, or leave the matrix out (quantization.formats)"
            )
            raise MaxlmError(message, where=name, fix=fix)
        dense = jnp.asarray(values, jnp.float32)
        for plane, codes in self._encoders[form](dense).items():
            self._writer.write(f"{name}.{plane}", lead_index, np.asarray(codes))


class DequantizedReader:
    """The parameters of a checkpoint with the values that its codes stand for, by
    slices."""

    def __init__(self, inner: CheckpointReader, forms: Mapping[str, MatrixForm]):
        self.inner = inner
        self.folder = inner.folder
        self._forms = forms
        codes = {
            f"{name}.{plane}"
            for name, form in forms.items()
            for plane in form.declare_planes()
        }
        self.shapes = {
            name: shape for name, shape in inner.shapes.items() if name not in codes
        }
        """Shapes of all parameters, by canonical name."""
        self.shapes |= {name: form.dense.shape for name, form in forms.items()}

    @contextmanager
    def open_slice_reader(
        self, name: str, num_lead_axes: int, scratch_folder: Path
    ) -> Iterator[ReadSlice]:
        """Opens a parameter to read its slices; see
        :class:`~maxlm.huggingface.checkpoint.RunCheckpointReader`."""
        form = self._forms.get(name)
        with ExitStack() as stack:

            def open_slices(name: str) -> ReadSlice:
                opened = self.inner.open_slice_reader(
                    name, num_lead_axes, scratch_folder
                )
                return stack.enter_context(opened)

            if form is None:
                yield open_slices(name)
                return
            readers = {
                plane: open_slices(f"{name}.{plane}") for plane in form.declare_planes()
            }

            @jax.jit
            def decode(arrays: Mapping[str, jax.Array]) -> jax.Array:
                return QuantizedParam(arrays, form).merge()

            def read_values(index: Shape) -> np.ndarray:
                arrays = {plane: read(index) for plane, read in readers.items()}
                return np.asarray(decode(arrays))

            yield read_values
