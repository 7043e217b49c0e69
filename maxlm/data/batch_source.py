"""Sources of batches: any row of any step's batch, made by anyone, at any time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

from maxlm.config.errors import MaxlmError

Batch = dict[str, np.ndarray]
"""int32 arrays [rows, seq_len] and float32 weights [rows, seq_len]:

tokens       token ids; 0 in padding.
targets      the next token of the same document, also where the document is cut here; 0 where
             there is none.
weights      1 where the target counts; 0 at a document's last token and in padding.
segment_ids  1, 2, ... for the row's pieces; 0 in padding.
positions    0, 1, ... within each piece. A piece that continues a cut document starts at 0 again,
             as attention cannot see what came before it.

A row may have arrays of other shapes and dtypes besides, such as a frontend's
(:mod:`maxlm.models.frontends`).
"""


@dataclass(frozen=True)
class BatchArraySpec:
    """One array of a batch, as every row has it."""

    shape: tuple[int, ...]
    """Shape of a row; the batch's leading dimensions come before it."""
    dtype: DTypeLike
    axes: tuple[str | None, ...]
    """The logical axis of each dimension (a field of AxisRules, or None)."""
    is_appended: bool = False
    """Whether an example has any number of entries along the first axis, which stand
    behind those of the row's examples before it. Otherwise an array without the axis
    "seq" has one for each example."""

    @classmethod
    def of_tokens(cls, length: int, dtype: DTypeLike = np.int32) -> "BatchArraySpec":
        """An array with a value for each token of a row."""
        return cls((length,), dtype, ("seq",))


class BatchSource(Protocol):
    """Makes the batch of every step; small to pickle, so that worker processes get a
    copy.

    A row depends on the step and its global number alone: runs resume at any step on
    any number of hosts, each of which makes the rows that its devices hold.
    """

    @property
    def num_steps(self) -> int | None:
        """Steps until the source ends; None: it does not."""
        ...

    def rows(self, step: int, row_numbers: Sequence[int], /) -> Batch:
        """Returns the given global rows [n] of the batch of ``step``, as arrays [n,
        ...]."""
        ...


@runtime_checkable
class RefusesRows(Protocol):
    """A batch source that leaves rows out which it cannot read or a task cannot learn;
    the run lists them in ``refused_rows.jsonl``."""

    @property
    def refused(self) -> Sequence[MaxlmError]:
        """Where each such row is, what is wrong with it and what to do."""
        ...
