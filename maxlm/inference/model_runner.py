"""A model on the devices: its parameters, its caches, and the programs that advance them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from maxlm.inference.adapter_slots import write_columns
from maxlm.inference.cache_updates import allocate_state, copy_pages, copy_rows, encode_row
from maxlm.inference.params import prepare_params
from maxlm.inference.step import StepInputs, StepOutputs, StepSizes, run_step
from maxlm.models.architectures import Model
from maxlm.models.caches import CacheLayout
from maxlm.models.params import Params


class ModelRunner:
    """Holds a model's parameters and caches, and runs its programs on the current mesh.

    Args:
        params: of the model, in any layout.
        windows: of the page tables that steps are given.
        max_length: tokens of the longest sequence.
        vocab_size: ids that may be drawn.
        adapters: A and B beside the parameters, which change in place.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        layout: CacheLayout,
        windows: tuple[int | None, ...],
        *,
        max_length: int,
        vocab_size: int,
        adapters: Mapping[str, list[jax.Array]] | None = None,
    ):
        self.model: Any = model
        self.params = prepare_params(model, params)
        self.state = allocate_state(model, layout, max_length)
        self._layout, self._windows = layout, windows
        self._max_length, self._vocab_size = max_length, vocab_size
        self._adapters = adapters

    def run(self, shape: StepSizes, inputs: StepInputs) -> StepOutputs:
        """Runs a step."""
        sizes = shape, self._layout, self._windows, self._vocab_size
        given = self.params, self.state, inputs, self._adapters
        self.state, outputs = run_step(self.model, *sizes, *given)
        return outputs

    def copy_pages(self, copies: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.state = copy_pages(self.model, self._layout, self.state, copies)

    def copy_rows(self, sources: np.ndarray) -> None:
        self.state = copy_rows(self.model, self._layout, self._max_length, self.state, sources)

    def encode(self, tokens: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> None:
        """Runs the encoder over one input of each shard, int32 [D, T], for one row each."""
        D, T = tokens.shape
        padded = np.zeros((D, round_up_to_bucket(T, self._max_length)), np.int32)
        padded[:, :T] = tokens
        sizes = self._layout, self._max_length
        given = self.params, self.state, padded, lengths, rows
        self.state = encode_row(self.model, *sizes, *given)


def round_up_to_bucket(n: int, limit: int) -> int:
    """Rounds n up to a power of two from 16 on, ``limit`` at most: few distinct sizes, hence few
    compilations."""
    return min(max(16, 1 << (n - 1).bit_length()), limit)


def count_compilations() -> int:
    """Returns how many programs steps have been compiled to, by all runners of this process."""
    programs: Any = run_step, copy_pages, copy_rows, encode_row, write_columns
    return sum(program._cache_size() for program in programs)
