"""Runs of neighbouring tokens, where a sequence is split over devices: what recurrences
and convolutions pass from one to the next.

A device holds one run of each row, or in balanced order two (see
:mod:`maxlm.parallel.context`). Everything here is for programs on shards. Devices
exchange what runs do to a state, which is small, and never tokens.

Shapes: b rows on a device, s tokens of them on the device, c tokens of a run, K runs of
a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.config.errors import check_requirements
from maxlm.parallel.context import require_split_length
from maxlm.parallel.layers import PyTree
from maxlm.parallel.local import Axes, make_spec
from maxlm.sharding import AxisRules


@dataclass(frozen=True)
class SequenceRuns:
    """The runs of a device's rows, on shards."""

    axes: Axes
    """Mesh axes over which sequences are split; none: a row is one run."""
    balanced: bool
    """Whether rows are in the balanced order of ``context.sequence_order_indices``."""
    device_index: jax.Array
    """int32 [1]: the device's number along ``axes``."""

    @property
    def are_split(self) -> bool:
        return bool(self.axes)

    @property
    def runs_per_device(self) -> int:
        return count_device_runs(self.axes, self.balanced)

    def split(self, x: jax.Array) -> jax.Array:
        """Splits rows [b, s, ...] into runs, side by side: [b · runs, c, ...]."""
        return split_runs(x, self.runs_per_device)

    def join(self, x: jax.Array) -> jax.Array:
        """Joins runs [b · runs, c, ...] → [b, s, ...]; inverts :meth:`split`."""
        num_runs = self.runs_per_device
        return x.reshape(x.shape[0] // num_runs, x.shape[1] * num_runs, *x.shape[2:])

    def find_starts(self, segment_ids: jax.Array | None) -> jax.Array | None:
        """Finds the tokens with which documents begin in packed rows.

        Args:
            segment_ids: int [b, s]; None: a row is one document.

        Returns:
            bool [b · runs, c]: whether a token's segment is another than that of the
            token before it in the sequence. None: no token begins one.
        """
        if segment_ids is None:
            return None
        runs = self.split(segment_ids)
        last_ids = runs[:, -1]
        # Before the first run is nothing, which no state can leak from.
        ids_before = self.pass_on(last_ids, shift_runs)
        before = jnp.concatenate([ids_before[:, None], runs[:, :-1]], axis=1)
        return runs != before

    def pass_on(
        self, arrays: PyTree, scan_runs: Callable[[PyTree], jax.Array]
    ) -> jax.Array:
        """Exchanges what each run has for the runs after it.

        Args:
            arrays: of each of the device's runs, [b · runs, ...].
            scan_runs: maps such arrays of all runs of a row in their order, [K, b,
                ...], to what stands before each run, [K, b, ...].

        Returns:
            What stands before each of the device's runs, [b · runs, ...].
        """
        # All summaries go to every device, which applies them by itself: they are small,
        # and a ring of devices would wait for one another once a run.
        before = scan_runs(jax.tree.map(self._gather, arrays))
        first = self.device_index[0]
        if self.runs_per_device == 1:
            return before[first]
        # As SequenceSplit.chunk_starts numbers chunks.
        last = len(before) - 1 - first
        both = jnp.stack([before[first], before[last]], axis=1)
        return both.reshape(-1, *both.shape[2:])

    def _gather(self, x: jax.Array) -> jax.Array:
        """Gathers [b · runs, ...] of all devices → [K, b, ...] in the runs' order."""
        num_runs = self.runs_per_device
        by_row = x.reshape(-1, num_runs, *x.shape[1:])
        by_run = jnp.moveaxis(by_row, 1, 0)
        if not self.axes:
            return by_run
        gathered = lax.all_gather(by_run, self.axes)
        if num_runs == 1:
            return gathered[:, 0]
        # Devices' late runs are in descending order.
        return jnp.concatenate([gathered[:, 0], gathered[::-1, 1]])


def count_device_runs(axes: Axes, balanced: bool) -> int:
    """Counts the runs of a row that a device holds, where ``axes`` split the
    sequence."""
    return 2 if axes and balanced else 1


def split_runs(x: jax.Array, num_runs: int) -> jax.Array:
    """Splits rows [b, s, ...] into runs, side by side: [b · runs, c, ...]."""
    num_rows, num_tokens, *features = x.shape
    return x.reshape(num_rows * num_runs, num_tokens // num_runs, *features)


def shift_runs(x: jax.Array) -> jax.Array:
    """Returns the array [K, ...] of the run before each, zeros before the first."""
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


class SequenceContext(NamedTuple):
    """What a device knows of its rows beside their features."""

    segment_ids: jax.Array | None
    device_index: jax.Array
    """int32 [1], along the axes of ``seq``."""


def make_context_specs(
    segment_ids: jax.Array | None, rules: AxisRules
) -> SequenceContext:
    """Returns the specs of a program's context."""
    index_spec = make_spec((rules.mesh_axes("seq"),))
    segment_spec = None if segment_ids is None else rules.spec("batch", "seq")
    return SequenceContext._make((segment_spec, index_spec))


def check_split_length(seq_len: int, rules: AxisRules, balanced: bool) -> None:
    """Raises MaxlmError: a sequence that does not divide over its devices."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    requirements = require_split_length(
        seq_len, rules=rules, sizes=sizes, balanced=balanced
    )
    check_requirements(requirements)
