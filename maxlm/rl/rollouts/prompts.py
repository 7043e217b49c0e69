"""Which prompt comes when: a pure function of the run's seed and a number."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maxlm.config import MaxlmError
from maxlm.data.loader.permutation import derive_key, derive_keys, permute
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.rl.environments.environment import Environment, PromptRows
from maxlm.rl.samples import Prompt
from maxlm.runtime.json_types import JsonMapping
from maxlm.runtime.pool import WorkerPool
from maxlm.runtime.progress import Progress, ignore_progress

LongPrompts = Literal["refuse", "leave_out"]
RowCheck = Callable[[JsonMapping, str], None]
"""Raises MaxlmError of a prompt's row, whose place it is told."""
_MANY_ROWS = 16384
"""So many prompts take longer to encode than processes to start: seconds."""
_PART_ROWS = 1024
"""Prompts that a process encodes at once."""


class PromptOrder:
    """The prompts of a run, in an order that anyone finds any place of in O(1).

    Prompt 0, 1, ... are those of the first epoch in an order of the seed's, then those
    of the second in another. Rows without end come in the order of their numbers.

    Args:
        seed: of the run.
        max_prompt_length: tokens of a prompt at most.
        long_prompts: whether a longer one is an error, or left out.
        shuffle: false: every epoch is in the order of the rows.
        workers: processes that encode many prompts once to know their lengths; None:
            one a core.
        check_row: called with every row and its place, unless there is no end of them;
            raises MaxlmError of one that rewards cannot read.

    Attributes:
        num_left_out: prompts of an epoch that are too long.

    Raises:
        MaxlmError: prompts that cannot be read, are too long or that ``check_row``
            refuses; before anything runs.
    """

    def __init__(
        self,
        environment: Environment,
        tokenizer: Tokenizer,
        *,
        seed: int,
        max_prompt_length: int,
        long_prompts: LongPrompts = "refuse",
        shuffle: bool = True,
        workers: int | None = 1,
        on_progress: Progress = ignore_progress,
        check_row: RowCheck | None = None,
    ):
        self.rows = environment.open_prompts(seed)
        self.num_left_out = 0
        self._environment = environment
        self._tokenizer = tokenizer
        self._max_prompt_length = max_prompt_length
        self._shuffle_key = derive_key(seed, "prompts") if shuffle else None
        self._row_numbers: NDArray[np.int64] | None = None
        """The rows that fit, ascending; None: rows without end."""
        num_rows = self.rows.num_rows
        if num_rows is None:
            return
        lengths = self._measure(num_rows, workers, on_progress, check_row)
        too_long = np.flatnonzero(lengths > max_prompt_length)
        if too_long.size and long_prompts == "refuse":
            first = int(too_long[0])
            raise self._make_length_error(first, int(lengths[first]), too_long.size)
        self.num_left_out = int(too_long.size)
        self._row_numbers = np.flatnonzero(lengths <= max_prompt_length)
        if not self._row_numbers.size:
            first = int(too_long[0]) if too_long.size else 0
            raise self._make_length_error(first, int(lengths[first]), too_long.size)

    @property
    def prompts_per_epoch(self) -> int | None:
        """Prompts of an epoch; None: there is no end of them."""
        return None if self._row_numbers is None else self._row_numbers.size

    def take(self, start: int, count: int) -> list[Prompt]:
        """Returns prompts ``start``, ``start + 1``, ... of the run. Raises MaxlmError:
        one of rows without end is too long."""
        row_numbers = self._list_rows(start, count)
        return [
            self._read(row_number, number)
            for number, row_number in enumerate(row_numbers, start)
        ]

    def _read(self, row_number: int, number: int) -> Prompt:
        row = self.rows[row_number]
        tokens = _encode_row(self._environment, self._tokenizer, self.rows, row_number)
        if len(tokens) > self._max_prompt_length:
            raise self._make_length_error(row_number, len(tokens), 1)
        return Prompt(row_number, tuple(tokens), row, number)

    def _list_rows(self, start: int, count: int) -> list[int]:
        numbers = np.arange(start, start + count, dtype=np.int64)
        if self._row_numbers is None:
            return numbers.tolist()
        epochs, places = np.divmod(numbers, self._row_numbers.size)
        if self._shuffle_key is not None:
            keys = derive_keys(self._shuffle_key, epochs)
            places = permute(places, self._row_numbers.size, keys)
        return self._row_numbers[places].tolist()

    def _measure(
        self,
        num_rows: int,
        workers: int | None,
        on_progress: Progress,
        check_row: RowCheck | None,
    ) -> NDArray[np.int64]:
        """Counts the tokens of each row's prompt, and checks the row."""
        num_parts = max(1, num_rows // _PART_ROWS)
        parts = [
            part.tolist() for part in np.array_split(np.arange(num_rows), num_parts)
        ]
        lengths = np.zeros(num_rows, np.int64)
        num_done = 0
        measure = partial(
            _measure_part, self._environment, self._tokenizer, self.rows, check_row
        )
        with WorkerPool(workers if num_rows >= _MANY_ROWS else 1) as pool:
            for numbers, part_lengths in pool.map_unordered(measure, parts):
                lengths[numbers] = part_lengths
                num_done += len(numbers)
                on_progress("encoding prompts", num_done, num_rows)
        return lengths

    def _make_length_error(
        self, row_number: int, num_tokens: int, num_too_long: int
    ) -> MaxlmError:
        message = (
            f"a prompt of {num_tokens:,} tokens, where there is room for "
            f"{self._max_prompt_length:,}"
        )
        if num_too_long > 1:
            message += f"; {num_too_long:,} prompts are too long"
        fix = "raise max_prompt_length, or set long_prompts=leave_out"
        where = self.rows.locate(row_number)
        return MaxlmError(message, where=where, fix=fix)


def _measure_part(
    environment: Environment,
    tokenizer: Tokenizer,
    rows: PromptRows,
    check_row: RowCheck | None,
    numbers: Sequence[int],
) -> tuple[Sequence[int], list[int]]:
    lengths = []
    for number in numbers:
        lengths.append(len(_encode_row(environment, tokenizer, rows, number)))
        if check_row is not None:
            check_row(rows[number], rows.locate(number))
    return numbers, lengths


def _encode_row(
    environment: Environment, tokenizer: Tokenizer, rows: PromptRows, row_number: int
) -> list[int]:
    """A row's prompt as tokens; an error names the row."""
    row = rows[row_number]
    try:
        tokens = environment.encode_prompt(tokenizer, row)
    except MaxlmError as error:
        where = rows.locate(row_number)
        if error.where is not None and error.where not in where:
            where = f"{where}, {error.where}"
        raise MaxlmError(error.message, where=where, fix=error.fix) from error
    if not tokens:
        message = "an empty prompt"
        fix = "leave the row out, or use a tokenizer that opens texts with a token"
        raise MaxlmError(message, where=rows.locate(row_number), fix=fix)
    return tokens
