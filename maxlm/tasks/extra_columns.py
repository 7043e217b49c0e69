"""Rows of files with columns that their own do not have."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.row_files import RowFiles

LOG_PROBS, MISMATCHED = "reference_log_probs", "mismatched_completion"
FIX = "compute it anew with precompute_reference_log_probs"


@dataclass(frozen=True)
class ExtendedRows(RowFiles):
    """Rows of files with more columns, pure in a row's number."""

    log_probs: Path | None = None
    """File of an array [rows, columns]."""
    with_mismatched: bool = False
    """Whether a row has the completion of the row before it too; the first, that of the last."""

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        row = super().__getitem__(index)
        if self.log_probs is not None:
            row = row | {LOG_PROBS: open_array(self.log_probs)[index]}
        if self.with_mismatched:
            other = super().__getitem__((index - 1) % len(self))
            row = row | {MISMATCHED: other.get("completion")}
        return row


@lru_cache(maxsize=8)
def open_array(path: Path) -> NDArray[np.float32]:
    """Reads a .npy file, once; raises MaxlmError if it is none."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MaxlmError(f"cannot be read: {error}", where=str(path), fix=FIX) from error
