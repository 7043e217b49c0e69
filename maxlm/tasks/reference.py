"""Preference tasks that measure a model against a frozen one, the reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import jax
import numpy as np
from numpy.typing import NDArray

from maxlm.config import LocalPath, MaxlmError
from maxlm.data.row_files import RowFiles
from maxlm.runtime.json_types import JsonObject
from maxlm.sharding.supported import ReshapingAxis
from maxlm.tasks.preference import PreferenceTask
from maxlm.tasks.rows import Arrays, ExampleEncoder, FileRow, FilesSetting
from maxlm.tasks.task import BoundModel, DeviceBatch, TaskModels, map_micro_batches

LOG_PROBS = "reference_log_probs"
MISMATCHED = "mismatched_completion"
_FIX = "compute it anew with precompute_reference_log_probs"


class ReferenceTask(PreferenceTask):
    """A preference task that measures against a frozen model."""

    mesh_axes: ClassVar[frozenset[ReshapingAxis]] = frozenset({"context", "stage"})

    prepares_batch_alone: ClassVar[bool] = True
    num_reference_columns: ClassVar[int] = 2
    """Log-probabilities of the reference that an example needs."""

    reference: LocalPath | None = None
    """Run whose model is the reference; null: the model that training starts from."""
    reference_log_probs: LocalPath | None = None
    """Folder of the reference's log-probabilities, which
    `precompute_reference_log_probs` writes (`files.npy` [rows, sequences],
    `validation_files.npy`): no second model is held then."""

    def frozen_models(self) -> Mapping[str, str | None]:
        if self.reference_log_probs is not None:
            return {}
        return {"reference": self.reference}

    def for_small_model(self) -> Self:
        return super().for_small_model().model_copy(update={LOG_PROBS: None})

    def compute_reference_log_probs(
        self, model: BoundModel, batch: DeviceBatch
    ) -> jax.Array:
        """Computes what the reference says of rows [..., S]: fp32 [..., E, columns]."""
        return self.compute_sequence_log_probs(model, batch).sums

    def prepare_batch(
        self, models: TaskModels, batch: DeviceBatch, key: jax.Array
    ) -> DeviceBatch:
        if LOG_PROBS in batch:
            return batch
        reference = models.frozen["reference"]
        log_probs = map_micro_batches(
            self.compute_reference_log_probs, reference, batch
        )
        return batch | {LOG_PROBS: log_probs}

    def example_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().example_shapes()
        if self.reference_log_probs is None:
            return shapes
        return shapes | {LOG_PROBS: (self.num_reference_columns,)}

    def extend_example(
        self, encoder: ExampleEncoder, row: FileRow, arrays: Arrays
    ) -> Arrays:
        if self.reference_log_probs is None:
            return arrays
        if np.isnan(row[LOG_PROBS]).any():
            raise MaxlmError(
                "no reference log-probability for this row", where=LOG_PROBS, fix=_FIX
            )
        return arrays | {LOG_PROBS: row[LOG_PROBS]}

    def open_files(self, setting: FilesSetting) -> RowFiles:
        file = super().open_files(setting)
        if self.reference_log_probs is None:
            return file
        path = Path(self.reference_log_probs, f"{setting}.npy")
        _open_array.cache_clear()  # it may have been written anew
        shape = _open_array(path).shape
        required = (len(file), self.num_reference_columns)
        if shape != required:
            message = f"an array {[*shape]}, where the files and the task need "
            message += f"{[*required]}"
            raise MaxlmError(message, where=str(path), fix=_FIX)
        return ExtendedRows(file.paths, file.starts, file.columns, log_probs=path)


@dataclass(frozen=True)
class ExtendedRows(RowFiles):
    """Rows of files with more columns, pure in a row's number."""

    log_probs: Path | None = None
    """File of an array [rows, columns]."""
    with_mismatched: bool = False
    """Whether a row has the completion of the row before it too; the first, that of the
    last."""

    def __getitem__(self, index: int, /) -> JsonObject:
        row = super().__getitem__(index)
        if self.log_probs is not None:
            row = row | {LOG_PROBS: _open_array(self.log_probs)[index]}
        if self.with_mismatched:
            previous_index = (index - 1) % len(self)
            row = row | {MISMATCHED: self._read_completion(previous_index)}
        return row

    def _read_completion(self, index: int) -> object:
        """Returns a row's completion; None where it has none, or cannot be read, which
        is reported when that row is read itself."""
        try:
            return super().__getitem__(index).get("completion")
        except MaxlmError:
            return None


@lru_cache(maxsize=8)
def _open_array(path: Path) -> NDArray[np.float32]:
    """Reads a .npy file, once; raises MaxlmError if it is none."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        message = f"cannot be read: {error}"
        raise MaxlmError(message, where=str(path), fix=_FIX) from error
